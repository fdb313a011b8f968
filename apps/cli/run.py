"""`edgert run`: one answer on the terminal or as JSON, or a conversation when a person sits there without a prompt.

Knows options and where text goes. The model's side is edgert.Runtime; the conversation's loop is conversation.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.cli.arguments import add_cluster_options, add_model_options, open_runtime, token_count, whole

if TYPE_CHECKING:
    from apps.cli.conversation import Conversation
    from apps.cli.interrupts import Interrupts
    from apps.cli.terminal import AnswerStream
    from edgert.generation import Generation
    from edgert.runtime import Runtime

_log = logging.getLogger(__name__)
_MAX_FORM_BYTES = 2**20  # the compilers' own bounds are lower (edgert/text/constraint_check.py)
_DESCRIPTION = """\
Answer a prompt. The prompt is an argument, a file, or standard input; what
standard input holds is added to the argument. Without any of them, on a
terminal, a conversation begins. Ctrl-C stops an answer and keeps what was said.
"""


def add_subcommand(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add `run`; its `func` takes the parsed arguments and returns the exit status."""
    parser = subparsers.add_parser("run", help="answer a prompt, or hold a conversation", description=_DESCRIPTION,
                                   usage="%(prog)s [options] MODEL [PROMPT]")
    add_model_options(parser)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the prompt, in quotes")
    group = parser.add_argument_group("prompt")
    group.add_argument("--prompt-file", metavar="FILE", help="take the prompt from a file, byte for byte; - is "
                                                             "standard input")
    group.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    group.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    group.add_argument("--context", type=token_count, metavar="N",
                       help="tokens of prompt and answer together: 8192 or 8k (default: the model's, at most 8k)")
    group.add_argument("--session", metavar="NAME",
                       help="go on with what was said under this name, without computing it again, and keep it")
    add_cluster_options(parser)
    _add_answer_options(parser)
    parser.set_defaults(func=run)


def _add_answer_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answer")
    group.add_argument("--max-tokens", type=whole, metavar="N", help="the longest answer (default: until it ends)")
    group.add_argument("--temp", type=float, default=0.8, metavar="T", help="0 takes the likeliest token (0.8)")
    group.add_argument("--top-k", type=int, default=40, metavar="N", help="choose among N tokens; 0 is all (40)")
    group.add_argument("--top-p", type=float, default=0.95, metavar="P", help="... that hold P of the chance (0.95)")
    group.add_argument("--min-p", type=float, default=0.05, metavar="P", help="... with P of the best one's (0.05)")
    group.add_argument("--repeat-penalty", type=float, default=1.0, metavar="X", help="1 is none (1.0)")
    group.add_argument("--seed", type=int, metavar="N", help="makes an answer that can be had again")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT",
                       help="end before this text; may be given several times")
    group.add_argument("--speculate", choices=("auto", "on", "off"), default="auto",
                       help="guess tokens that the text before suggests and verify several at once; auto does so where "
                            "weights stream")
    form = group.add_mutually_exclusive_group()
    form.add_argument("--json-schema", metavar="FILE", help="answer with JSON that this schema admits")
    form.add_argument("--grammar", metavar="FILE", help="answer with text that this GBNF grammar admits")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true",
                        help="print one line: an object with text, token ids, timings, memory and plan")
    output.add_argument("--trace", type=Path, metavar="FILE",
                        help="write where the time went, for chrome://tracing or Perfetto")


def run(args: argparse.Namespace) -> int:
    """Answer once, or converse. What can be refused is refused before the model is opened."""
    from apps.cli.interrupts import Interrupts
    from apps.cli.prompt import read_prompt
    from apps.cli.terminal import AnswerStream
    from edgert.errors import UsageError

    if args.raw and args.system is not None:
        raise UsageError("--system needs the chat template, which --raw leaves out", "Give one of them.")
    prompt = read_prompt(args.prompt, args.prompt_file, sys.stdin)
    if prompt is None and args.json:
        raise UsageError("--json needs a prompt", "Give a text as argument or with --prompt-file.")
    output, options = AnswerStream(sys.stdout), answer_options(args)
    with Interrupts() as interrupts, open_runtime(args, args.context, args.trace, args.speculate,
                                                args.session) as runtime:
        interrupts.raise_missed()
        raw = args.raw or not runtime.has_template
        if raw and args.system is not None:
            raise UsageError(f"{runtime.model.path.name} has no chat template, which --system needs",
                             "Put what the model should know into the prompt.")
        from apps.cli.conversation import Conversation, converse

        conversation = Conversation(runtime, raw=raw, system=args.system, options=options)
        if prompt is None:
            return converse(conversation, output, interrupts)
        return _answer_once(args, conversation, prompt, output, interrupts)


def answer_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of Runtime.generate. Raises UsageError."""
    from edgert.text.sampler import SamplingParams

    sampling = SamplingParams(temperature=args.temp, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p,
                              repeat_penalty=args.repeat_penalty, seed=args.seed)
    return {"max_tokens": args.max_tokens, "sampling": sampling, "stop": args.stop,
            "json_schema": _text_of(args.json_schema), "grammar": _text_of(args.grammar)}


def _text_of(name: str | None) -> str | None:
    """The text of a schema or grammar file, read no further than its compiler would."""
    from edgert.errors import UsageError

    if name is None:
        return None
    try:
        with Path(name).open("rb") as file:
            return file.read(_MAX_FORM_BYTES).decode()
    except OSError as error:
        raise UsageError(f"{name}: {error.strerror}", "Name a file with a JSON schema or a GBNF grammar.") from error
    except UnicodeDecodeError:
        raise UsageError(f"{name} is not UTF-8 text", "Name a file with a JSON schema or a GBNF grammar.") from None


def _answer_once(args: argparse.Namespace, conversation: Conversation, prompt: bytes, output: AnswerStream,
                 interrupts: Interrupts) -> int:
    from apps.cli.interrupts import exit_status

    runtime = conversation.runtime
    # Bytes that are not UTF-8 pass through the template as surrogates, and become bytes again as tokens.
    text = prompt.decode("utf-8", errors="surrogateescape")
    generation = conversation.start(text)
    with interrupts.stopping(generation.cancel):
        stream_answer(generation, None if args.json else output)
        if args.json:
            output.write(json.dumps(answer_object(generation, runtime)) + "\n")
        report(generation, runtime)
    conversation.keep(text, generation.text)
    return 0 if interrupts.stopped_by is None else exit_status(interrupts.stopped_by)


def stream_answer(generation: Generation, output: AnswerStream | None) -> None:
    """Write the pieces as they come; without `output`, only let them come."""
    timings = generation.timings
    _log.info("prompt", extra={"fields": {"cache_n": timings.cache_n, "prompt_n": timings.prompt_n}})
    for piece in generation:
        if output is not None:
            output.write(piece.text)
    if output is not None:
        output.end_line()


def answer_object(generation: Generation, runtime: Runtime) -> dict[str, Any]:
    """What `--json` prints. The end token is not among `token_ids`."""
    return {"text": generation.text, "prompt_token_ids": generation.prompt_token_ids,
            "token_ids": generation.token_ids, "finish_reason": generation.finish_reason,
            "timings": generation.timings.to_dict(), "memory": runtime.memory(), "plan": runtime.plan()}


def report(generation: Generation, runtime: Runtime) -> None:
    """Log how it went; warn when the context ended the answer, since nothing is cut silently."""
    _log.info("answer", extra={"fields": {"finish_reason": generation.finish_reason, **generation.timings.to_dict()}})
    n_tokens = len(generation.prompt_token_ids) + len(generation.token_ids)
    if generation.finish_reason == "length" and n_tokens >= runtime.context_length:
        _log.warning("the answer ends here: the context of %d tokens is full", runtime.context_length)
