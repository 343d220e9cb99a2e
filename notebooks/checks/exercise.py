"""What makes a check of an exercise."""

import functools
from collections.abc import Callable


def exercise(check: Callable[..., None]) -> Callable[..., bool]:
    """Make a judge of a reader's answer from assertions about it: the first that fails is printed as a hint.

    The judge returns whether all hold; `None` in the answer's place is not started.
    """

    @functools.wraps(check)
    def judge(answer: object, *facts: object) -> bool:
        if answer is None:
            print("not started: replace None by your answer and run this cell again")
            return False
        try:
            check(answer, *facts)
        except AssertionError as error:
            print(f"not yet: {error}")
        except Exception as error:  # the reader's code may raise anything; say it, and go on
            print(f"not yet: your code raised {type(error).__name__}: {error}")
        else:
            print("right")
            return True
        return False

    return judge
