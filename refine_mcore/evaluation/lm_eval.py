"""lm-evaluation-harness on this project's checkpoints (extra `eval`): its own command, with the
model `refine_mcore` known to it.

    python -m refine_mcore.evaluation.lm_eval --model refine_mcore \\
        --model_args checkpoint=CKPT[,tokenizer=FILE][,dtype=bfloat16] --tasks TASK [...]

Texts of any length are read from beginning to end in slices, and streams of unlike lengths go on
together without padding. A request without a context is conditioned on the tokenizer's EOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from tqdm import tqdm

from refine_mcore.config import config_from_dict
from refine_mcore.errors import UserError, cli
from refine_mcore.evaluation.checkpoint import open_checkpoint
from refine_mcore.evaluation.next_token import token_scores
from refine_mcore.generation import Sampling, generate, response_text


def _without_the_harness(_: list[str]) -> None:
    raise UserError("lm-evaluation-harness is not installed: `make setup EXTRAS=eval` installs it")


try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError:
    if __name__ != "__main__":
        raise
    cli(_without_the_harness)


@register_model("refine_mcore")
class RefineMcoreLM(TemplateLM):
    """The harness's interface. `batch_size` is of generation; `dtype` as `training.dtype`."""

    def __init__(
        self,
        checkpoint: str,
        tokenizer: str | None = None,
        dtype: str = "float32",
        batch_size: int | str = 4,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch_size must be a positive number, not {batch_size!r}")
        self._batch_size = int(batch_size)
        config = config_from_dict(
            {"model": {"checkpoint": checkpoint}, "training": {"dtype": dtype}}, "--model_args"
        )
        self._open = ExitStack()
        opened = self._open.enter_context(open_checkpoint(config, tokenizer))
        self._lm, self._tokenizer, self._ends, _ = opened

    def close(self) -> None:
        """Let go of the model and the ranks' connections."""
        self._open.close()

    @property
    def eot_token_id(self) -> int:
        if self._tokenizer.eos_id < 0:
            raise UserError("a request without a context needs a tokenizer with EOS")
        return self._tokenizer.eos_id

    def tok_encode(self, string: str, **_: Any) -> list[int]:
        return self._tokenizer.text_to_ids(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        found = []
        for _strings, context, continuation in tqdm(requests, disable=disable_tqdm):
            losses, likeliest, _drawn = token_scores(self._lm, [*context, *continuation])
            own = slice(len(losses) - len(continuation), None)
            found.append((-losses[own].sum().item(), bool(likeliest[own].all())))
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        found = []
        for request in tqdm(requests, disable=disable_tqdm):
            (text,) = request.args
            tokens = self.tok_encode(text)
            losses, _, _ = token_scores(self._lm, [self.eot_token_id, *tokens])
            found.append(-losses.sum().item())
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Requests alike in their settings are batched in their order."""
        found: list[str] = []
        bar = tqdm(total=len(requests), disable=disable_tqdm)
        while len(found) < len(requests):
            options = requests[len(found)].args[1]
            batch = []
            for request in requests[len(found) : len(found) + self._batch_size]:
                if request.args[1] != options:
                    break
                batch.append(self.tok_encode(request.args[0]))
            found += self._generated(batch, options, len(found))
            bar.update(len(batch))
        bar.close()
        return found

    def _generated(
        self, prompts: list[list[int]], options: dict[str, Any], first: int
    ) -> list[str]:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        sampled = options.get("do_sample", float(options.get("temperature", 0)) > 0)
        sampling = Sampling(
            temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
            top_k=int(options.get("top_k", 0)),
            top_p=float(options.get("top_p", 1.0)),
        )
        most = int(options.get("max_gen_toks", options.get("max_new_tokens", 256)))

        def ended(tokens: list[int]) -> bool:
            text = response_text(self._tokenizer, (), tokens, special_tokens=True)
            return any(stop in text for stop in until)

        responses = generate(
            self._lm,
            prompts,
            most,
            sampling=sampling,
            ids=range(first, first + len(prompts)),
            end_tokens=self._ends,
            stop=ended if until else None,
        )
        texts = []
        for prompt, tokens in zip(prompts, responses, strict=True):
            text = response_text(self._tokenizer, prompt, tokens)
            texts.append(min((text.split(stop)[0] for stop in until), key=len, default=text))
        return texts


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
