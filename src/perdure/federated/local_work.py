"""Length of the clients' training in a round, as Flower users give it: local epochs or steps.

A learner's plan is made for a whole experience, so that its noise is calibrated before the first
step. So local epochs or steps of a round are multiplied by the rounds, and the plan is divided into
the rounds again.
"""

from collections.abc import Mapping

from perdure.learner.learner import Learner


def set_local_work(learner: Learner, task: Mapping[str, int]) -> None:
    """Set a learner's epochs or iterations of an experience, before it is prepared.

    Args:
        learner: learner of a client or of the server.
        task: numbers `rounds`, `local_epochs` and `local_steps`; the last two are 0 if not given.
    """
    if task.get("local_steps"):
        learner.epochs = None
        learner.iterations = task["rounds"] * task["local_steps"]
    elif task.get("local_epochs"):
        learner.epochs = task["rounds"] * task["local_epochs"]
        learner.iterations = None
