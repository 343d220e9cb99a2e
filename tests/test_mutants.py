"""The table of planted faults fits the code, without planting any: `make mutants` does that, and takes its time."""

from mutants import ROOT, read_table


def test_each_fault_has_one_place_and_a_test() -> None:
    mutants = read_table()
    assert len(mutants) > 90 and len({mutant.name for mutant in mutants}) == len(mutants)
    for mutant in mutants:
        assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1, mutant.name
        assert mutant.new != mutant.old
        file, _, test = mutant.test.partition("::")
        assert f"def {test.partition('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8"), mutant.test
