"""A verifier of one's own: any function (prompt, response) -> score in [0, 1].

    python examples/5_own_verifier.py

The pool finds it by name, "module:function", in processes of its own that can be killed. There the module is imported
with this program's `sys.path`, on which Python puts a program's own folder: so this very file is the module
`5_own_verifier`, wherever it is run from. (An `import` statement could not spell that name; the pool needs none.) As
the workers import the file too, what it does as a program stands under `if __name__`.
"""

import re

from prime_train.config.settings import load_config
from prime_train.verify import Answer, VerifierPool, metrics

WORKED = re.compile(r"([:~\n=+-]*\d+)+\n#(?P<answer>\d\d)")
"""Steps of the quickstart's arithmetic, `:17+5=22` done with care or `~22-3=29` carelessly, and the answer."""


def careful(prompt: str, response: str) -> float:
    """1 for the right answer, half of that if a step was careless, else 0.

    It has two faults, for what becomes of them. Where a response does not look like worked steps, it raises. And where
    one has a long row of digits and no answer, the regular expression tries every way to cut the row into numbers
    before it gives up: longer than anybody waits, and nothing in the same process could interrupt it.
    """
    answer = WORKED.fullmatch(response)["answer"]  # type: ignore[index]
    right = sum(int(number) for number in re.findall(r"[+-]?\d+", prompt)) % 100
    if int(answer) != right:
        return 0.0
    return 0.5 if "~" in response else 1.0


CUSTOM = "5_own_verifier:careful"

if __name__ == "__main__":
    responses = {
        "careful": ":17+5=22\n:22-3=19\n#19",
        "careless, right": ":17+5=22\n~22-3=19\n#19",
        "careless, wrong": ":17+5=22\n~22-3=29\n#29",
        "no steps": "I do not know",
        "endless digits": ":17+5=" + 40 * "2",
    }
    answers = [
        Answer(id=name, prompt="17+5-3", response=response, ability="arithmetic", reference="19")
        for name, response in responses.items()
    ]
    with VerifierPool(workers=2, deadline_s=2.0, custom=CUSTOM) as pool:
        verdicts = pool.verify(answers)  # what fails is told on stderr too, as soon as it has
    for verdict in verdicts:
        print(f"{verdict.id:16}{verdict.score:.1f}  {verdict.status:8}{verdict.detail}".rstrip())
    counted = metrics(verdicts)
    print(f"mean score {counted['score']:.2f}, time-outs {counted['timeouts']:.0f}, errors {counted['errors']:.0f}")

    # The same in training: the workers get the run's `sys.path`, which must have the module's folder.
    options = ["--verify.custom", CUSTOM, "--verify.deadline", "2"]
    verify = load_config("quickstart", options).verify  # refuses unknown keys and wrong values
    print("\nin a configuration file:")
    print(f'  [verify]\n  custom = "{verify.custom}"\n  deadline = {verify.deadline:g}')
    print("on the command line:")
    print(f"  PYTHONPATH=examples prime-train run quickstart \\\n      {' '.join(options)}")
