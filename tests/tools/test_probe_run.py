"""The probe of a GPU, all of it at tiny sizes."""

from probe import main


def test_all_of_it_runs_at_tiny_sizes(tmp_path, capsys):
    """In this process; within 25 minutes on a GPU, each section in its own."""
    main(["--small", "--here", "--folder", str(tmp_path)])
    printed = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    names = [line.partition(":")[0] for line in printed]
    assert names == [
        *("attention", "barrier", "fp8", "unrolled blocks", "streaming", "int8 in a small pool"),
    ]
    assert " x, needed 1.25 x)" in printed[2]
    assert " s a step beside " in printed[4]
