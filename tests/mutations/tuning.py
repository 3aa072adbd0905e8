"""Bugs in the choice of configurations by time."""

from __future__ import annotations

from mutations.mutation import Mutation

TESTS = "tests/interpret/test_tune.py"


def _mutations(file: str, *changes: tuple[str, str, str]) -> tuple[Mutation, ...]:
    return tuple(Mutation(f"kernels/{file}", old, new, note, TESTS) for old, new, note in changes)


TUNING = (
    *_mutations(
        "_tune.py",
        ('if mode == "0":', 'if mode == "x":', "stored choices are taken when switched off"),
        ('mode == "1" and may_time', 'mode != "0" and may_time', "cached mode times"),
        ("chosen is None and mode", "mode", "timed at every call"),
        ("if dataclasses.asdict(each) == fields), None)", "), allowed[0])",
         "any configuration is taken from the file"),
        ("if INTERPRETING or any(", "if any(", "timed in the interpreter"),
        ("return not torch.cuda.is_current_stream_capturing()", "return True",
         "timed in a capture"),
        ("isinstance(each, FakeTensor) or not each.is_cuda", "not each.is_cuda",
         "timed on fake tensors"),
        ('each.fill_(float("nan"))', "pass", "what is not written passes for a result"),
        ("equal_nan=True", "equal_nan=False", "NaN differs from NaN"),
        ("relative, absolute,", "relative, 0.0,", "no room for cancelled terms"),
        ("relative, absolute,", "0.0, absolute,", "no room for rounding"),
        ("elif time < best_time:", "elif time > best_time:", "the slowest"),
        ("best, best_time = config, time\n", "best = config\n", "the last that beats the table"),
        ("        except torch.OutOfMemoryError:\n            raise\n", "",
         "a lack of memory is stored as a candidate's fault"),
        ("if why is not None:", "if why is None:", "bad candidates are kept"),
    ),
    *_mutations(
        "_choices.py",
        ("    if found not in MODES:\n", "    if found is None:\n", "any value is taken"),
        ("in (None, stale):", "in (None, stale) or True:", "the last choice holds"),
        ("in (None, stale):", "is None:", "a stale choice stays"),
        ("fcntl.LOCK_EX", "fcntl.LOCK_SH", "writers lose each other's choices"),
        ("os.replace(name, path)", "path.write_text(Path(name).read_text())",
         "readers see half a file"),
        ("            choices = read(path)\n", "            choices = dict(known(path))\n",
         "choices of other processes are lost"),
        ('content.get("format") != FORMAT', "False", "another format"),
    ),
)  # fmt: skip
