# SPDX-License-Identifier: MIT
"""The files as a reader meets them: short, alike, and each readable without the others."""

import ast
import io
import re
import tokenize

import pytest

from tests.conftest import ROOT

LIMITS = {"sst": (560, 4800), "cbsa": (580, 4900), "scinet": (560, 4800), "common": (420, 4100)}
KINDS = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
text = {name: (ROOT / f"{name}.py").read_text(encoding="utf-8") for name in LIMITS}
nodes = {name: [*ast.walk(ast.parse(text[name]))] for name in LIMITS}


def tokens(name):
    """The line of each token of the code, docstrings left out."""
    docs = set()
    for node in nodes[name]:
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
            docs |= {*range(node.lineno, node.end_lineno + 1)}
    found = tokenize.generate_tokens(io.StringIO(text[name]).readline)
    return [t.start[0] for t in found if t.type in KINDS and t.start[0] not in docs]


@pytest.mark.parametrize("name", LIMITS)
def test_a_file_stays_within_what_a_reader_can_take(name):
    lines, most = LIMITS[name]
    at = tokens(name)
    assert text[name].count("\n") <= lines and len(at) <= most and len(at) <= 12 * len({*at})
    assert max(map(len, text[name].splitlines())) <= 100
    functions = [node for node in nodes[name] if isinstance(node, ast.FunctionDef)]
    for f in functions:
        assert sum(f.lineno <= line <= f.end_lineno for line in at) <= 600, f.name
        assert len(f.args.args) + len(f.args.kwonlyargs) <= 8, f.name


def test_common_knows_no_network_device_process_or_command_line():
    words = "open_clip timm argparse distributed environ cuda nn. optim global".split()
    assert [word for word in words if re.search(rf"\b{re.escape(word)}", text["common"])] == []


@pytest.mark.parametrize("name", ["sst", "cbsa", "scinet"])
def test_a_script_imports_few_names(name):
    imports = [node for node in nodes[name] if isinstance(node, ast.ImportFrom)]
    assert sum(len(node.names) for node in imports if node.module == "common") <= 14
    assert "import common" not in text[name]


def test_what_the_scripts_repeat_they_repeat_word_for_word():
    for function in "parse_args load_checkpoint make_loader start_device save".split():
        pattern = re.compile(rf"^def {function}\(.*?(?=^(?:def |class |# |if ))", re.M | re.S)
        found = {pattern.search(text[name])[0].strip() for name in ("sst", "cbsa", "scinet")}
        assert len(found) == 1, function
