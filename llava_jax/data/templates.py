"""Defines conversation templates, which determine how a conversation becomes a single text."""

import dataclasses

SYSTEM_SLOT = "{system}"
"""Placeholder of the system text in `Template.human_prefix`."""


@dataclasses.dataclass(frozen=True)
class Template:
    """The texts that surround the turns of a conversation.

    A name in braces is one control token. `{bos}` and `{eos}` are the tokenizer's BOS and EOS
    tokens; `{bos}` is left out if the tokenizer has no BOS token. `{bos?}` is the BOS token, but
    only if the tokenizer itself puts a BOS token before every text. Any other name, such as
    `{<|eot_id|>}`, is looked up in the vocabulary.

    Attributes:
        begin: Text at the start of the conversation.
        system: System text of conversations that have no system turn.
        system_prefix: Text before the system text; not used if the system text is empty.
        system_suffix: Text after the system text; not used if the system text is empty.
        human_prefix: Text before each human turn. In the first turn, `{system}` is replaced by the
            system text with its prefix and suffix; in other turns, `{system}` is removed. If the
            prefix does not contain `{system}`, system turns are left out.
        answer_prefix: Text between a human turn and its answer. Spaces at the end of this text are
            learned with the answer and are not part of a prompt, because tokenizers join a space
            to the next word.
        answer_suffix: Text after each answer. It is learned together with the answer.
        separator: Text after the suffix of each answer. It is not learned.
        image_suffix: Text after each image if the turn also has text.
        keeps_questions: Whether the text of human turns is kept; otherwise only their images are
            kept.
    """

    begin: str = "{bos}"
    system: str = ""
    system_prefix: str = ""
    system_suffix: str = ""
    human_prefix: str = ""
    answer_prefix: str = ""
    answer_suffix: str = "{eos}"
    separator: str = ""
    image_suffix: str = "\n"
    keeps_questions: bool = True


_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


_LLAMA_2 = (  # Meta's system text
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased "
    "and positive in nature.\n\nIf a question does not make any sense, or is not factually "
    "coherent, explain why instead of answering something not correct. If you don't know the "
    "answer to a question, please don't share false information."
)


_LLAVA = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)

_LLAMA_3 = Template(  # Llama 3's own template, which is also XTuner's llama3_chat
    system_prefix="{<|start_header_id|>}system{<|end_header_id|>}\n\n",
    system_suffix="{<|eot_id|>}",
    human_prefix="{system}{<|start_header_id|>}user{<|end_header_id|>}\n\n",
    answer_prefix="{<|eot_id|>}{<|start_header_id|>}assistant{<|end_header_id|>}\n\n",
    answer_suffix="{<|eot_id|>}",
)


TEMPLATES = {
    "vicuna_v1": Template(
        system=_VICUNA,
        system_suffix=" ",
        human_prefix="{system}USER: ",
        answer_prefix=" ASSISTANT: ",
    ),
    "plain": Template(answer_suffix="\n", image_suffix="", keeps_questions=False),
    # XTuner's PROMPT_TEMPLATE.vicuna: every round starts with a BOS token, and only conversations
    # with a system turn have a system text, which then follows Vicuna's system text.
    "vicuna_xtuner": Template(
        begin="",
        system_prefix=_VICUNA + " ",
        system_suffix="\n ",
        human_prefix="{bos}{system}USER: ",
        answer_prefix=" ASSISTANT: ",
        separator="\n",
    ),
    # LLaVA's llama_2 and mistral_instruct: the space between an answer and {eos} is learned too.
    "llama_2": Template(
        begin="",
        system=_LLAMA_2,
        system_prefix="<<SYS>>\n",
        system_suffix="\n<</SYS>>\n\n",
        human_prefix="{bos}[INST] {system}",
        answer_prefix=" [/INST] ",
        answer_suffix=" {eos}",
    ),
    "mistral_instruct": Template(
        system_suffix="\n\n",  # Mistral's tokenizer writes this before the first question
        human_prefix="[INST] {system}",
        answer_prefix=" [/INST] ",
        answer_suffix=" {eos}",
    ),
    "llama_3": _LLAMA_3,
    "llava_llama_3": dataclasses.replace(_LLAMA_3, system=_LLAVA),  # LLaVA-NeXT with Llama 3
    # The template of Qwen, and of LLaVA-NeXT and OneVision with Qwen.
    "chatml": Template(
        begin="{bos?}",
        system="You are a helpful assistant.",
        system_prefix="{<|im_start|>}system\n",
        system_suffix="{<|im_end|>}\n",
        human_prefix="{system}{<|im_start|>}user\n",
        answer_prefix="{<|im_end|>}\n{<|im_start|>}assistant\n",
        answer_suffix="{<|im_end|>}",
        separator="\n",
    ),
    # The template of LLaVA-NeXT with Yi 34B.
    "chatml_direct": Template(
        begin="{bos?}",
        system="Answer the questions.",
        system_prefix="{<|im_start|>}system\n",
        system_suffix="{<|im_end|>}",
        human_prefix="{system}{<|im_start|>}user\n",
        answer_prefix="{<|im_end|>}{<|im_start|>}assistant\n",
        answer_suffix="{<|im_end|>}",
    ),
}
"""Maps the values of `data.template` to the templates."""
