"""A fresh, small language model with a tokenizer of its own, for models that are trained from nothing.

A recipe asks for it with the arguments of `save_language_model` in place of a folder:

    model: {vision: google/mobilenet_v2_1.0_224, text: {hidden_size: 192, texts: [captions.txt]}}

The tokenizer is a byte-level BPE: any text goes in and comes back. It learns from the prompts and answers of all
templates, from drawn and asked scenes, and from the given texts. Every word that scenes describe objects with is one
token.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from perceptiongpt.configuration_perceptiongpt import ADDED_TOKENS
from perceptiongpt.data.scenes.dataset import ScenesDataset
from perceptiongpt.data.scenes.expressions import ORDINALS, plural
from perceptiongpt.data.scenes.pictures import COLORS, DOT, PATTERNS, SHAPES
from perceptiongpt.data.scenes.tasks import NUMBERS
from perceptiongpt.data.templates import load_templates


# How often each word of `whole_words` is counted: in a share of all lines, so that it is merged early on.
LEAST_COUNT, COUNTED_SHARE = 2000, 0.05
SCENES = 100  # drawn and asked about
MLP_SHARE = 0.3  # of what an MLP with the library's initial weights would add
MARK = 2.0  # the first entry of every token embedding
NUM_GATHERING_LAYERS, GATHERING_WEIGHT = 2, 0.6
ROLES = ("system", "user", "assistant")  # chat templates name them in every turn


def whole_words() -> list[str]:
    """The words that are always one token: those that scenes describe objects with."""
    nouns = [*SHAPES, DOT, "shape"]
    return list(dict.fromkeys([*COLORS, *PATTERNS, *nouns, *map(plural, nouns), *NUMBERS, *ORDINALS]))


def training_texts(files: Iterable[str | Path]) -> Iterator[str]:
    """The texts that a tokenizer learns from; of files, each line."""
    for template in load_templates().values():
        yield from template["prompts"]
        yield from template.get("answers", ())
    for file in files:
        yield from Path(file).read_text(encoding="utf-8").splitlines()
    scenes = ScenesDataset(SCENES, size=64)
    for index in range(SCENES):
        for row in scenes.image_rows(index):
            for message in row["messages"]:
                text = message["content"]
                for token in ADDED_TOKENS:
                    text = text.replace(token, "")
                yield text


def train_tokenizer(files: Iterable[str | Path] = (), vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer.

    Args:
        files: texts to learn from beside templates and scenes.
        vocab_size: entries, before those that PerceptionGPT adds.

    Raises:
        ValueError: there is no room for the words of scenes.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = list(training_texts(files))
    count = max(LEAST_COUNT, int(COUNTED_SHARE * len(texts)))
    words = [" ".join(["", *[word] * count]) for word in whole_words()]
    words += ["\n".join([role] * count) for role in ROLES]
    bpe.train_from_iterator([*words, *texts], trainer)
    split = [word for word in whole_words() if len(bpe.encode(f" {word}").ids) != 1]
    if split:
        raise ValueError(f"vocab_size {vocab_size} has no room for the words of scenes, such as {split[0]!r}")
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@torch.no_grad()
def let_like_find_like(model: LlamaForCausalLM) -> None:
    """Initial weights with which a small model soon finds what a word names among the cells of an image.

    In the manner of "Mimetic Initialization of Self-Attention Layers" (arXiv 2305.09828): queries equal keys, so that a
    token looks at what is like it; the output projection is the transpose of the values', so that what it finds arrives
    as it was. In the first layers one head looks at the words just before, whatever they are: all embeddings agree in
    their first entry, which image cells do not have. So the last state of a question gathers its words, and looks for
    what is like all of them. Embeddings have the size of what passes through the layers, and MLPs add little at first.
    """
    config = model.config
    model.model.embed_tokens.weight.normal_(0.0, 1.0)
    model.model.embed_tokens.weight[:, 0] = MARK
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        attention.o_proj.weight.copy_(attention.v_proj.weight.T)
        layer.mlp.down_proj.weight.mul_(MLP_SHARE)
        if index < NUM_GATHERING_LAYERS:
            for projection in (attention.q_proj, attention.k_proj):
                projection.weight[-config.head_dim :] = 0.0
                projection.weight[-config.head_dim :, 0] = GATHERING_WEIGHT
            attention.o_proj.weight[:, -config.head_dim :] *= config.num_attention_heads**0.5


def save_language_model(
    output: str | Path,
    *,
    texts: Iterable[str | Path] = (),
    vocab_size: int = 2048,
    hidden_size: int = 192,
    num_layers: int = 5,
    num_heads: int = 6,
    seed: int = 0,
) -> None:
    """Save a random Llama and its new tokenizer in the Hub's format.

    Args:
        output: the folder.
        texts: text files for the tokenizer to learn from, beside templates and scenes.
        vocab_size: entries of the tokenizer, before those that PerceptionGPT adds.
        hidden_size, num_layers, num_heads: sizes of the model.
        seed: of its weights.
    """
    tokenizer = train_tokenizer(texts, vocab_size)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=2048,
        initializer_range=hidden_size**-0.5,  # the usual 0.02 is meant for models that are far wider
        # A word is compared with cells hundreds of tokens away: most rotations of a narrow head must be slow.
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,  # the output's are far smaller
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        let_like_find_like(model)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
