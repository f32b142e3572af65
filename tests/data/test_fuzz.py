"""A few hundred mutated files: refused with a reason, or read as an independent reader does. See
fuzz_nifti.
"""

from tests.data import fuzz_nifti


def test_mutated_files_are_refused_or_read_right(tmp_path):
    tally = fuzz_nifti.run(tmp_path, 600, seed=1)
    assert tally["slow"] == 0
    assert tally["read"] > 30
    assert len(tally) > 12
