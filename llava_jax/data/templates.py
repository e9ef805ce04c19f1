"""Conversation templates: how turns become one text."""

import dataclasses

from llava_jax.errors import SampleError as SampleError

SYSTEM_SLOT = "{system}"


@dataclasses.dataclass(frozen=True)
class Template:
    """The text around the turns of a conversation.

    A name in braces is one control token: `{bos}` and `{eos}` are the tokenizer's own (a tokenizer
    without a `bos` starts without one), `{bos?}` is a `bos` if the tokenizer puts one before every
    text, any other is looked up by its name, as `{<|eot_id|>}`.

    Attributes:
        begin: Before all else.
        system: What the system says, unless the conversation has a system turn of its own.
        system_prefix: Before what the system says, if it says anything.
        system_suffix: After it.
        human_prefix: Before each human turn. The first one's has the system's text, and what is
            around it, at `{system}`; a template without that place leaves system turns out.
        answer_prefix: Between a human turn and its answer. Spaces at its end are learned with the
            answer and left to it in prompts: tokenizers join a space to the word that follows.
        answer_suffix: After each answer, and learned with it.
        separator: After that, and not learned.
        image_suffix: After each image, when text follows it in its turn.
        keeps_questions: Whether the text of human turns is kept, or only their images.
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


_LLAMA_2 = (  # Meta's
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased "
    "and positive in nature.\n\nIf a question does not make any sense, or is not factually "
    "coherent, explain why instead of answering something not correct. If you don't know the "
    "answer to a question, please don't share false information."
)


TEMPLATES = {
    "vicuna_v1": Template(
        system=_VICUNA,
        system_suffix=" ",
        human_prefix="{system}USER: ",
        answer_prefix=" ASSISTANT: ",
    ),
    "plain": Template(answer_suffix="\n", image_suffix="", keeps_questions=False),
    # XTuner's PROMPT_TEMPLATE.vicuna: every round begins anew, and there is no system text unless
    # the data has one, which then follows the usual one.
    "vicuna_xtuner": Template(
        begin="",
        system_prefix=_VICUNA + " ",
        system_suffix="\n ",
        human_prefix="{bos}{system}USER: ",
        answer_prefix=" ASSISTANT: ",
        separator="\n",
    ),
    # LLaVA's llama_2 and mistral_instruct: a space before the end of an answer is learned too.
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
        system_suffix="\n\n",  # as Mistral's tokenizer joins it to the first question
        human_prefix="[INST] {system}",
        answer_prefix=" [/INST] ",
        answer_suffix=" {eos}",
    ),
    # Llama 3's own, and XTuner's llama3_chat.
    "llama_3": Template(
        system_prefix="{<|start_header_id|>}system{<|end_header_id|>}\n\n",
        system_suffix="{<|eot_id|>}",
        human_prefix="{system}{<|start_header_id|>}user{<|end_header_id|>}\n\n",
        answer_prefix="{<|eot_id|>}{<|start_header_id|>}assistant{<|end_header_id|>}\n\n",
        answer_suffix="{<|eot_id|>}",
    ),
    # As Qwen has it, and LLaVA-NeXT for Qwen.
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
}
