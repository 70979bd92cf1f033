"""Rows of what is counted: one that fails takes no other with it, and finished ones are kept."""

from benchmarks._counted import Task, counted
from benchmarks._finished import finished, keep
from counted_tasks import count


def test_a_task_that_fails_takes_no_other_with_it():
    names = ("first", "fails", "slow", "ends", "last")
    tasks = [Task(name, "llama-1b", True) for name in names]
    found = counted(count, {"data": 8}, tasks, patience=5.0)
    assert list(found) == [
        {"name": "first", "devices": 8},
        {"failed": "ValueError: no such model"},
        {"failed": "took more than 5 seconds"},
        {"failed": "it ended"},
        {"name": "last", "devices": 8},
    ]


def test_rows_are_kept_that_did_not_fail_and_are_of_the_same_code(tmp_path):
    store = tmp_path / "rows.jsonl"
    keep(store, "new", {"name": "a"})
    keep(store, "new", {"name": "b", "failed": "it ended"})
    keep(store, "old", {"name": "c"})
    with store.open("a") as file:
        file.write('{"source": "new", "row": {"na')
    assert finished(store, "new") == [{"name": "a"}]
