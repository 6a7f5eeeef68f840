"""A fresh, small language model with a tokenizer of its own, for models that are trained from nothing.

A recipe asks for it with the arguments of `save_language_model` in place of a folder:

    model: {vision: google/mobilenet_v2_1.0_224, text: {hidden_size: 192, texts: [captions.txt]}}

The tokenizer is a byte-level BPE: any text goes in and comes back. It learns from the prompts and answers of all
templates, from drawn and asked scenes, and from the given texts. Every word that scenes describe objects with is one
token.
"""

import math
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
# Of the initial weights, for embeddings whose entries have size 1.
MARK, SINK = 2.0, 10.0  # the first entry of all embeddings; the second of the roles' names
NEAR_FREQUENCIES = (0.075, 0.03)  # radians per token
NEAR_WEIGHT, MARK_WEIGHT = 1.5, 3.0  # of queries and keys
SHARPNESS = 1.3  # of the queries and keys of the middle layer
GAIN = 8.0  # of what the first and the middle layer find
OTHERS_SHARE = 0.1  # of what the library's initial weights would add
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
    whole = [*(f" {word}" for word in whole_words()), *ROLES]
    split = [word for word in whole if len(bpe.encode(word).ids) != 1]
    if split:
        raise ValueError(f"vocab_size {vocab_size} has no room for the words of scenes and roles, such as {split[0]!r}")
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@torch.no_grad()
def let_words_find_cells(model: LlamaForCausalLM, tokenizer) -> None:
    """Initial weights with which a small model soon finds what words name among the cells of an image.

    Learned from nothing, it takes tens of thousands of questions until any gradient says which cell to look at. So
    three things that it would have to come upon are there from the start, in the manner of "Mimetic Initialization of
    Self-Attention Layers" (arXiv 2305.09828):

    - The first layer adds to each token the words just before it, so that the end of a question holds the question.
      All word embeddings have `MARK` in their first entry and cells its negative, which `dense.py` sees to; so cells
      can be left out. What is no word looks at the names of roles, which say nothing: they have a second mark.
    - The queries of the middle layer equal its keys, so that a token finds what is like it. All heads look alike, and
      values pass through unchanged, so that the token gets the cell that it found with all that the cell says.
    - All other layers add little.

    Args:
        model: a model of `save_language_model`.
        tokenizer: its tokenizer.
    """
    config, embeddings = model.config, model.model.embed_tokens.weight
    embeddings.normal_(0.0, 1.0)
    embeddings[:, :2] = 0.0
    embeddings.mul_(config.hidden_size**0.5 / embeddings.norm(dim=-1, keepdim=True))
    roles = tokenizer.convert_tokens_to_ids(list(ROLES))
    embeddings[roles] = 0.0
    embeddings[roles, 1] = SINK
    embeddings[:, 0] = MARK

    layers = model.model.layers
    for layer in layers:
        layer.self_attn.o_proj.weight.mul_(OTHERS_SHARE)
        layer.mlp.down_proj.weight.mul_(OTHERS_SHARE)

    gathering, finding = layers[0].self_attn, layers[len(layers) // 2].self_attn
    one_head = SHARPNESS * finding.q_proj.weight[: config.head_dim]
    for projection in (finding.q_proj, finding.k_proj):
        projection.weight.copy_(one_head.repeat(config.num_attention_heads, 1))
    for attention in (gathering, finding):
        attention.v_proj.weight.copy_(torch.eye(config.hidden_size))
        attention.v_proj.weight[:2] = 0.0
        attention.o_proj.weight.copy_(GAIN * torch.eye(config.hidden_size))
    if gathering is finding:
        return
    # Of a head's pairs of dimensions, those that turn at `NEAR_FREQUENCIES` fade within some ten tokens, the last two
    # hardly turn at all.
    num_pairs = config.head_dim // 2
    theta = config.rope_parameters["rope_theta"]
    near = [round(num_pairs * math.log(1 / frequency, theta)) for frequency in NEAR_FREQUENCIES]
    queries, keys = (
        projection.weight.zero_().unflatten(0, (config.num_attention_heads, config.head_dim))
        for projection in (gathering.q_proj, gathering.k_proj)
    )
    for projection in (queries, keys):
        projection[:, near, 0] = NEAR_WEIGHT
        projection[:, num_pairs - 2, 0] = MARK_WEIGHT
    queries[:, num_pairs - 1, 0], keys[:, num_pairs - 1, 1] = -MARK_WEIGHT, MARK_WEIGHT


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
        let_words_find_cells(model, tokenizer)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
