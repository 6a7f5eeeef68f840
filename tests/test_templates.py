"""Prompts and forms of answers."""

import pytest

from perceptiongpt.data.schema import DIRECT_TASKS, TASKS
from perceptiongpt.data.templates import load_templates, render_prompt, render_turn, stable_generator


WITHOUT_PROMPTS = {"no_target", "dialogue"}  # these ask with the prompts of the others
PLACEHOLDERS = {
    "box_to_mask": ["<vis>"],
    "point_to_mask": ["<vis>"],
    "caption": [],
    "region_caption": ["<vis>"],
    "spotting_caption": [],
    "region_vqa": ["<vis>", "{phrase}"],
}


def test_every_task_has_prompts():
    assert set(load_templates()) == set(TASKS) - WITHOUT_PROMPTS


@pytest.mark.parametrize("task", sorted(set(TASKS) - WITHOUT_PROMPTS))
def test_prompts_and_answers(task):
    template = load_templates()[task]
    assert len(set(template["prompts"])) >= 20
    assert template["evaluation"] in template["prompts"]
    wanted = PLACEHOLDERS.get(task, ["{phrase}"])
    for prompt in template["prompts"]:
        assert [name for name in ("<vis>", "{phrase}") if name in prompt] == wanted
        assert all(prompt.count(name) == 1 for name in wanted)
    if task in DIRECT_TASKS:
        assert "answers" not in template
    else:
        assert len(set(template["answers"])) >= 3
        for answer in template["answers"]:
            assert answer.count("{answer}") == 1
            assert answer.count("{evidence}") == (task == "grounded_vqa")
    drawn = {render_prompt(task, "it", stable_generator(0, index)) for index in range(300)}
    assert len(drawn) >= 20


def test_rendering():
    assert render_prompt("refer", "the dog") == "Find the dog."
    assert render_prompt("refer", "a {curly} <3") == "Find a {curly} <3."
    assert render_turn("caption", answer="A dog.") == ("Describe the image in one sentence.", "A dog.")
    question = render_turn("grounded_vqa", "What is it?", "A dog.", evidence="<p>this</p><vis>")
    assert question == ("What is it? Show what your answer rests on.", "<p>this</p><vis>: A dog.")
    assert render_turn("detect", "dog", "<vis><vis>")[1] == "<vis><vis>"
    with pytest.raises(ValueError, match="no prompt templates for task 'dialogue'"):
        render_prompt("dialogue")


@pytest.mark.parametrize("task", ["refer", "detect", "point", "point_all"])
def test_prompts_read_well_whatever_the_phrase(task):
    """Plurals, vowels, names and phrases with their own article: no article before it, no verb that agrees with it."""
    for prompt in load_templates()[task]["prompts"]:
        before, after = prompt.split("{phrase}")
        assert not before.lower().endswith((" a ", " an ", " is ", " does ", " the ")), prompt
        assert not after.startswith((" is", " does", " has")) and " it?" not in after, prompt
        if task in ("detect", "point_all"):
            assert before.lower().endswith(("every ", "each ", "every single ", "miss any ")), prompt


@pytest.mark.parametrize(
    ("question", "sentence"),
    [
        ("what is this", "What is this?"),
        ("in which hand is it", "In which hand is it?"),
        ("Is it red?", "Is it red?"),
        ("describe the man", "Describe the man."),
        ('What says "stop"', 'What says "stop"?'),
        ('Find "exit."', 'Find "exit."'),
        ("Whatever is cold, show it", "Whatever is cold, show it."),
    ],
)
@pytest.mark.parametrize("task", ["vqa", "region_vqa", "grounded_vqa", "reasoning"])
def test_questions_are_sentences_in_every_prompt(task, question, sentence):
    drawn = {render_prompt(task, question, stable_generator(0, index)) for index in range(300)}
    assert len(drawn) >= 20
    for prompt in drawn:
        assert sentence in prompt and f"{sentence}." not in prompt
        before = prompt.partition(sentence)[0].rstrip()
        assert not before or before[-1] in ".:?"


def test_evaluation_prompt_always_has_the_first_form():
    answers = {}
    for index in range(500):
        prompt, answer = render_turn("vqa", "Is it?", "yes", stable_generator(1, index))
        answers.setdefault(prompt, set()).add(answer)
    assert answers[render_prompt("vqa", "Is it?")] == {"yes"}
    assert len(set.union(*answers.values())) == len(load_templates()["vqa"]["answers"])
    assert render_turn("vqa", "Is it?", "yes", stable_generator(1, 5)) == render_turn(
        "vqa", "Is it?", "yes", stable_generator(1, 5)
    )
