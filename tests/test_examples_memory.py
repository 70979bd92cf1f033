"""The examples about memory run and show what they claim."""

import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"

SPEECH = "FIRST CITIZEN:\nBefore we proceed any further, hear me speak.\n\nALL:\nSpeak, speak.\n\n"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "play.txt"
    path.write_text(SPEECH * 40, encoding="utf-8")
    return path


@pytest.mark.slow
def test_released_gradients_train_alike_and_take_less(text_file):
    layers = 8
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.run(
        [
            *(sys.executable, str(EXAMPLES / "release_gradients.py"), "--data", str(text_file)),
            *("--layers", str(layers), "--steps", "10", "--batch-size", "2"),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "XLA_FLAGS": ""},
        cwd=ROOT,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    rows = {}
    for name in ("ordinary", "released"):
        row = re.search(rf"^{name} +([\d.]+) +([\d.]+) MB +([\d.]+) MB$", process.stdout, re.M)
        assert row is not None, process.stdout
        rows[name] = [float(figure) for figure in row.groups()]
    (loss, peak, beside), (other_loss, other_peak, other_beside) = rows.values()
    # Both know more than that the text has so many characters.
    assert max(loss, other_loss) < math.log(len(set(SPEECH)))
    layer = float(re.search(r"those of a layer, ([\d.]+) MB", process.stdout)[1])
    # All layers' gradients but one, less a copy of parameters and two moments of one layer.
    saved = beside - other_beside
    assert (layers - 4.5) * layer < saved < layers * layer
    assert peak - other_peak == pytest.approx(saved, abs=0.02)


def test_a_bad_argument_ends_the_example_with_a_message(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    main = importlib.import_module("release_gradients").main
    for arguments, message in [
        (["--layers", "0"], "must be a whole number of at least 1, got '0'"),
        (["--optimizer", "sgd"], "invalid choice: 'sgd'"),
        (["--data", "nowhere.txt"], "'nowhere.txt', which is not a file"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
