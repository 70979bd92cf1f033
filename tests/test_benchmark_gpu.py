"""The GPU benchmark, tried where there is none: its order, that it goes on, what it counts."""

import json
import os
import re
import time

import pytest

import benchmarks.gpu as gpu
import benchmarks.report as report
from benchmarks._apart import Apart, FailedError, line
from benchmarks._frameworks import room
from benchmarks._gpu_rows import DECAY, FLOOR, GPU_SIZES, TRAJECTORIES, TRIED, Row, rows
from benchmarks._protocol import run


def measure(tmp_path, monkeypatch, found, *arguments):
    """Runs the command with rows measured by `found`; what it wrote, and the rows it measured."""
    asked = []

    class Here(Apart):
        def call(self, seconds, function, row, repeats):
            asked.append(row.key)
            try:
                return found(row)
            except Exception as error:
                raise FailedError(line(error)) from error

    monkeypatch.setattr(gpu, "Apart", Here)
    argv = ["--device", "cpu", "--sizes", "tiny", "--framework", "torch", *arguments]
    run(gpu.PROTOCOL, [*argv, "--output", str(tmp_path)])
    return json.loads((tmp_path / "gpu-tiny-cpu.json").read_text()), asked


def quick(row):
    numbers = {"copy": {"moved_bytes": 800, "milliseconds": 1.0}}
    step = {"label": row.name, "milliseconds": 2.0, "moved_bytes": 1600, "launches": 3}
    return numbers.get(row.kind, step if row.kind == "step" else {"error": ""})


def test_the_most_valuable_rows_come_first_and_none_twice():
    found = rows(["100m", "1b"], ["torch", "jax"])
    assert len({row.key for row in found}) == len(found)
    assert [row.key for row in found[:3]] == [
        "copy torch 100m", "step torch adamw 100m", "step torch meta3 100m"
    ]  # fmt: skip
    assert found[-1].kind == "training"


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")

    def fails(row):
        if row.name == "axiom" and row.kind == "step":
            raise MemoryError("no memory\nat all")
        return quick(row)

    result, asked = measure(tmp_path, monkeypatch, fails)
    assert len(asked) == len(rows(["tiny"], ["torch"])) == len(result["rows"])
    (failed,) = [row for row in result["rows"] if "failed" in row]
    assert failed["failed"] == "MemoryError: no memory"
    with (tmp_path / "gpu-rows.jsonl").open("a") as file:
        file.write('{"source": "a run that was ki')
    result, asked = measure(tmp_path, monkeypatch, quick)
    assert asked == ["step torch axiom tiny"]
    assert not any("failed" in row for row in result["rows"])
    result, asked = measure(tmp_path, monkeypatch, quick, "--repeats", "3")
    assert len(asked) == len(result["rows"])  # other figures
    assert "On a GPU." in capsys.readouterr().out


def test_no_row_is_begun_when_time_is_up(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    result, asked = measure(tmp_path, monkeypatch, quick, "--minutes", "-1")
    assert (asked, result["rows"]) == ([], [])
    assert len(result["left"]) == len(rows(["tiny"], ["torch"]))
    assert "rows are left" in capsys.readouterr().out


def test_bandwidth_is_a_share_of_the_copy_and_the_floor_one_of_adamw():
    copy = {**Row("copy", "torch", size="tiny")._asdict(), **quick(Row("copy", "torch"))}
    steps = [
        {**(row := Row("step", "torch", name, "tiny"))._asdict(), **quick(row)} for name in FLOOR
    ]
    table = gpu.PROTOCOL.rows({"rows": [copy, *steps], "device": "cpu", "left": []}).rows
    assert table[2][3:10] == ("2.000", "", "", "1.00", "1.14", "16.0", "100%")


def test_bytes_of_a_step_are_those_of_every_tensor_read_and_written_once():
    torch = pytest.importorskip("torch")
    from benchmarks._torch.launches import bytes_of

    many = {"table": torch.zeros(15, 1, dtype=torch.int64), "G": 0, "M": 0, "P": 0, "V": 0}
    many |= {"chunks": torch.zeros(1, 2, dtype=torch.int32), "AVERAGED": False}
    many["table"][9] = 1024

    def words(kernel, **given):
        return bytes_of(kernel, many | given, 1) / 4096

    sums, adam = words("sums_of_chunks", M=-1, P=-1), words("update_of_chunks")
    assert (sums + adam, sums + words("update_of_chunks", V=-1)) == (
        FLOOR["meta3"], FLOOR["meta_lion"]
    )  # fmt: skip
    driven = words("sums_of_chunks", P=-1) + words("update_of_chunks", AVERAGED=True)
    assert driven == FLOOR["self_driving"]
    assert bytes_of("sums_of_all", {"WIDTH": 256}, 1) == 0
    matrix = {"rows": 32, "columns": 32, "numel": 1024, "G": 0, "P": 0, "M": 0}
    of_matrix = ("squares_of_matrix", "sizes_of_matrix", "move_of_matrix")
    assert sum(bytes_of(kernel, matrix, 1) for kernel in of_matrix) == 6 * 4096
    assert bytes_of("momentum_of_tensor", matrix | {"M": 3}, 1) == 1024 * (8 + 2 * (0.5 + 2 / 256))


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_parity_compares_the_same_optimizer(name):
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    ours, theirs = (
        room(framework, "gpu", "gpu").trajectory(name, GPU_SIZES[TRIED], 3, DECAY)
        for framework in ("jax", "torch")
    )
    assert max(abs(ours[key] - theirs[key]).max() for key in theirs) < 1e-7


def test_what_crashes_hangs_or_raises_is_told_and_the_next_call_begins_anew():
    with Apart() as apart:
        first = apart.call(60.0, os.getpid)
        assert apart.call(60.0, os.getpid) == first != os.getpid()
        for seconds, call, why in (
            (60.0, (int, "none\nat all"), "ValueError: invalid literal for int() with base 10: "),
            (60.0, (os._exit, 9), "the process ended with exit code 9"),
            (0.1, (time.sleep, 60.0), "TimeoutError: not finished after 0 s"),
        ):
            with pytest.raises(FailedError, match=re.escape(why)):
                apart.call(seconds, *call)
            assert apart.call(60.0, os.getpid) != first


@pytest.mark.slow
def test_every_row_is_measured_on_a_cpu(tmp_path):
    pytest.importorskip("torch")
    argv = ["--device", "cpu", "--sizes", "tiny", "--repeats", "1", "--minutes", "60"]
    run(gpu.PROTOCOL, [*argv, "--output", str(tmp_path)])
    path = tmp_path / "gpu-tiny-cpu.json"
    result = json.loads(path.read_text())
    needs_more = ("torchao", "bitsandbytes")
    failed = {r["name"] or r["kind"]: r["failed"] for r in result["rows"] if "failed" in r}
    assert {n: why for n, why in failed.items() if not n.startswith(needs_more)} == {}
    assert result["left"] == []
    assert len(gpu.PROTOCOL.rows(result).rows) == len(result["rows"])
    assert "\n| Meta3 | PyTorch | tiny |" in report.write({path: result})


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        run(gpu.PROTOCOL, ["--framework", "torch", "--output", str(tmp_path)])
    assert "there is no GPU to measure" in capsys.readouterr().err
