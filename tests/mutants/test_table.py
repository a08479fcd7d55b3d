"""The table of mutants speaks of code and of tests that are there."""

from tests.mutants.__main__ import ROOT, mutants


def test_texts_stand_once_and_tests_exist() -> None:
    table = mutants()
    assert [m.name for m in table if m.occurrences() != 1] == []
    for m in table:
        source = (ROOT / m.file).read_text(encoding="utf-8")
        compile(source.replace(m.text, m.replacement), m.name, "exec")
        path, _, test = m.test.partition("::")
        code = (ROOT / path).read_text(encoding="utf-8")
        assert f"def {test.partition('[')[0]}(" in code, m.test
