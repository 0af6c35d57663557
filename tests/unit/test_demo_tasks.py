"""What the demo's fine-tunes learn, and that held-out means held out."""

from itertools import islice

import pytest

from deltazip_deployments.demo.tasks import TASKS, Example, Task

BY_NAME = {task.name: task for task in TASKS}


@pytest.mark.parametrize(
    ("task", "question", "answer"),
    [
        ("sort", "delta", "adelt"),
        ("reverse", "delta", "atled"),
        ("cipher", "xyz", "abc"),
        ("add", "47+85", "132"),
        ("mask", "ab 12 c 3", "ab <number> c <number>"),
    ],
)
def test_right_answers(task: str, question: str, answer: str) -> None:
    assert BY_NAME[task].answer(question) == answer


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
class TestExamples:
    def test_held_out_questions_are_never_trained_on(self, task: Task) -> None:
        trained = {example.question for example in islice(task.examples(0, held_out=False), 5000)}
        asked = {example.question for example in task.held_out(1, 100)}
        assert len(asked) == 100
        assert not trained & asked

    def test_repeating_the_question_is_never_right(self, task: Task) -> None:
        examples = [*islice(task.examples(2, held_out=False), 500), *task.held_out(2, 100)]
        assert all(example.question != example.answer for example in examples)

    def test_equal_seeds_give_equal_examples(self, task: Task) -> None:
        def first(seed: int) -> list[Example]:
            return list(islice(task.examples(seed, held_out=False), 50))

        assert first(3) == first(3) != first(4)
