"""The torch sampler: continuous batching of many tenants' requests over one base model.

Each step is one pass: a prefill chunk of waiting requests, or a decode step of all running
sequences, in turns while there is both. Requests join and leave between steps. Here requests
begin and end; ``scheduler`` says whose turn it is, ``passes`` computes.
"""

import logging
import uuid
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from twinkle_dask.errors import (
    InvalidRequest,
    Saturated,
    ServiceFault,
    StartupError,
    TwinkleDaskError,
)
from twinkle_dask.model.base import BaseModel
from twinkle_dask.sampler.adapters import AdapterStore
from twinkle_dask.sampler.drawing import Uniforms
from twinkle_dask.sampler.interface import SampleDone, SampleWork
from twinkle_dask.sampler.lanes import KvMemory, Lane
from twinkle_dask.sampler.masks import DecodeMasks
from twinkle_dask.sampler.passes import Drawn, Passes
from twinkle_dask.sampler.scheduler import Scheduler
from twinkle_dask.sampler.scoring import PromptScores, wants_scores
from twinkle_dask.sampler.sequences import Job, Request, Sequence
from twinkle_dask.sampler.startup import check_decoding, default_kv_bytes, kv_layout, text_config
from twinkle_dask.sampler.stopping import StopRule
from twinkle_dask.types import AdapterState

log = logging.getLogger(__name__)

_OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchSamplerConfig:
    """Settings of the torch sampler.

    Attributes:
        max_kv_bytes: Memory for keys and values of everything running and being prefilled; None
            chooses by device. Half of it bounds the length of one sequence.
        max_adapter_bytes: Memory for adapters; those in use may exceed it.
        max_sequences: Sequences that run at once.
        prefill_tokens: Upper bound of padded tokens in one prefill pass; None chooses by device.
        lane_tokens: Lengths at which sequences move on to a lane of longer ones.
    """

    max_kv_bytes: int | None = None
    max_adapter_bytes: int = 2**30
    max_sequences: int = 64
    prefill_tokens: int | None = None
    lane_tokens: tuple[int, ...] = (1024, 8192)


class TorchSampler:
    """A ``Sampler`` over a base model that others (a trainer) may use between its steps.

    Attributes:
        max_length: Longest prompt plus output, in tokens; longer output ends as LENGTH.
        tokens_done: Tokens read and written since the start.
    """

    def __init__(self, base: BaseModel, config: TorchSamplerConfig | None = None) -> None:
        """Check that the model can be sampled and set the memory's bound.

        Raises:
            CannotSample: The architecture is not supported.
            StartupError: ``max_kv_bytes`` is too little.
        """
        config = config or TorchSamplerConfig()
        self._base = base
        layout, masks = kv_layout(base), DecodeMasks(text_config(base))
        check_decoding(base, layout, masks)
        self._kv = KvMemory(
            layout,
            max_bytes=config.max_kv_bytes or default_kv_bytes(base.device),
            ceilings=config.lane_tokens,
        )
        self.max_length = self._length_limit()
        on_cpu = base.device.type == "cpu"
        self._schedule = Scheduler(
            self._kv,
            max_sequences=config.max_sequences,
            prefill_tokens=config.prefill_tokens or (256 if on_cpu else 4096),
        )
        self._passes = Passes(base, masks)
        self._adapters = AdapterStore(base, max_bytes=config.max_adapter_bytes)
        self._requests: dict[str, Request] = {}
        self._ended: list[SampleDone] = []
        self._ages = count()
        self._prefill_next = True
        self.tokens_done = 0

    @property
    def busy(self) -> bool:
        """Whether ``step`` has anything to do or to give back."""
        return bool(self._requests or self._ended)

    @property
    def tokenizer(self) -> Any | None:
        """The Hugging Face tokenizer of the model, if it has one."""
        return self._base.tokenizer

    @property
    def num_running(self) -> int:
        """Sequences that get a token in each decode step."""
        return len(self._schedule.running)

    @property
    def kv_bytes(self) -> int:
        """Memory that keys and values take at the moment."""
        return self._kv.num_bytes

    def add_adapter(self, key: str, state: AdapterState) -> None:
        """Take in an immutable copy of an adapter; see ``Sampler.add_adapter``."""
        self._adapters.add(key, state)

    def has_adapter(self, key: str) -> bool:
        """Whether requests may name ``key`` now."""
        return key in self._adapters

    def submit(self, work: SampleWork) -> None:
        """Queue a request; see ``Sampler.submit``."""
        if work.id in self._requests:
            raise ValueError(f"a request {work.id!r} is there already")
        try:
            request = self._accept(work)
        except TwinkleDaskError as error:
            self._ended.append(SampleDone(work.id, error))
            return
        self._requests[work.id] = request
        request.account.live += 1
        job = Job(request, request.prompt, list(request.sequences), scores=request.scores)
        self._schedule.add(job)

    @torch.inference_mode()
    def cancel(self, work_id: str) -> None:
        """Drop a request and free what it holds at once; it gets no outcome."""
        self._ended = [done for done in self._ended if done.id != work_id]
        if (request := self._requests.get(work_id)) is not None:
            self._forget(request)

    @torch.inference_mode()
    def step(self) -> list[SampleDone]:
        """Run one pass; returns the requests that ended."""
        try:
            self._schedule.place()
            if self._prefill_next or not self._schedule.running:
                self._prefill_next = False
                if self._prefill():
                    return self._take_ended()
            self._prefill_next = True
            # Longest lane first: what moves up meanwhile gets its next token in the next step.
            for lane in reversed(self._kv.lanes):
                self._schedule.prepare(lane)
                self._decode(lane)
        except Exception as error:
            # Passes have their own guards, so this is memory that is not there.
            if not self._requests:
                raise
            self._start_over(error)
        return self._take_ended()

    def _take_ended(self) -> list[SampleDone]:
        ended, self._ended = self._ended, []
        return ended

    def _length_limit(self) -> int:
        context = self._base.facts.context_length
        if self._kv.max_length < min(context, 64):
            raise StartupError(
                "The sampler's memory for keys and values is too small: it holds sequences of "
                f"{self._kv.max_length} tokens. Raise max_kv_bytes."
            )
        if self._kv.max_length < context:
            log.warning(
                "Sequences are limited to %d tokens by max_kv_bytes; the model could take %d",
                self._kv.max_length,
                context,
            )
        return min(self._kv.max_length, context)

    def _accept(self, work: SampleWork) -> Request:
        asked, prompt = work.request, work.request.prompt.tolist()
        if not 1 <= len(prompt) <= self.max_length:
            raise InvalidRequest(
                f"The prompt has {len(prompt)} tokens; 1 to {self.max_length} are possible."
            )
        # An id outside would be an error on a CPU, but on a GPU the end of the process.
        vocab_size = self._base.facts.vocab_size
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise InvalidRequest("The prompt has tokens outside of the vocabulary.")
        if not 0 <= asked.topk_sample_logprobs <= vocab_size:
            raise InvalidRequest(f"A place has from 0 to {vocab_size} likeliest tokens.")
        scores = PromptScores(asked, vocab_size) if wants_scores(asked) else None
        max_tokens = max(1, self.max_length - len(prompt))
        if asked.params.max_tokens is not None:
            max_tokens = min(max_tokens, asked.params.max_tokens)
        if max_tokens < 1 or asked.num_samples < 1:
            raise InvalidRequest("max_tokens and num_samples must be at least 1.")
        stops = [
            StopRule(
                asked.params.stop,
                max_tokens=max_tokens,
                end_of_sequence_ids=self._base.facts.eos_token_ids,
                prompt=prompt,
                tokenizer=self._base.tokenizer,
            )
            for _ in range(asked.num_samples)
        ]
        adapter = None if work.adapter is None else self._adapters.take(work.adapter)
        request = Request(
            work=work,
            age=next(self._ages),
            account=self._schedule.account(work.tenant),
            adapter=adapter,
            prompt=prompt,
            scores=scores,
            unfinished=asked.num_samples,
        )
        seed = asked.params.seed
        request.sequences = [
            Sequence(request, index, Uniforms(seed, index), stop)
            for index, stop in enumerate(stops)
        ]
        return request

    def _prefill(self) -> bool:
        jobs = self._schedule.next_prefill()
        if not jobs:
            return False
        before = sum(job.done for job in jobs)
        try:
            drawn = self._passes.prefill(jobs, self._schedule.begin(jobs))
        except Exception as error:
            if len(jobs) > 1:
                log.warning("A prefill of %d requests failed", len(jobs), exc_info=error)
                self._schedule.retry_alone(jobs)
            else:
                self._schedule.abandon(jobs[0])
                self._fail(jobs[0].request, error)
            return True
        self.tokens_done += sum(job.done for job in jobs) - before
        going_on = self._add(drawn)
        for job in jobs:
            if job.done == len(job.tokens):
                job.sequences = [s for s in job.sequences if s in going_on]
        self._schedule.prefilled(jobs)
        self._end_requests(drawn)
        return True

    def _decode(self, lane: Lane) -> None:
        if not lane.rows:
            return
        failed: list[tuple[Sequence, Exception]] = []
        drawn = self._decode_rows(lane, 0, len(lane.rows), failed)
        going_on = self._add(drawn)
        for found in drawn:
            if found.sequence not in going_on:
                lane.remove(found.sequence)
        self._end_requests(drawn)
        for sequence, error in failed:
            self._fail(sequence.request, error)

    def _decode_rows(
        self, lane: Lane, start: int, stop: int, failed: list[tuple[Sequence, Exception]]
    ) -> list[Drawn]:
        """Decode rows together; if that fails, halves of them, down to the one at fault."""
        try:
            return self._passes.decode(lane, slice(start, stop))
        except Exception as error:
            if stop - start == 1:
                failed.append((lane.rows[start], error))
                return []
            log.warning("A decode pass of %d rows failed", stop - start, exc_info=error)
        middle = (start + stop) // 2
        drawn = self._decode_rows(lane, start, middle, failed)
        return drawn + self._decode_rows(lane, middle, stop, failed)

    def _start_over(self, error: Exception) -> None:
        """There is less memory than ``max_kv_bytes`` says: one request fails, the others wait."""
        log.error("Keys and values cannot be kept", exc_info=error)
        self._schedule.start_over()
        self._fail(max(self._requests.values(), key=lambda request: request.age), error)

    def _add(self, drawn: list[Drawn]) -> set[Sequence]:
        """Give sequences their tokens and charge for them; returns those that go on."""
        going_on: set[Sequence] = set()
        for found in drawn:
            sequence = found.sequence
            sequence.request.account.served += 1
            watch = sequence.request.work.watch
            if watch is not None and found.logprob == found.logprob:  # else the request fails
                watch(sequence.index, found.token, found.logprob, found.top)
            if sequence.add(found.token, found.logprob, found.top):
                going_on.add(sequence)
            else:
                sequence.request.unfinished -= 1
        self.tokens_done += len(drawn)
        return going_on

    def _end_requests(self, drawn: list[Drawn]) -> None:
        for found in drawn:
            request = found.sequence.request
            if request.work.id not in self._requests:
                continue
            if found.logprob != found.logprob:
                self._fail(request, InvalidRequest(_NOT_FINITE))
            elif not request.unfinished:
                self._forget(request)
                self._ended.append(SampleDone(request.work.id, request.result()))

    def _fail(self, request: Request, error: Exception) -> None:
        if request.work.id in self._requests:
            self._forget(request)
            self._ended.append(SampleDone(request.work.id, _as_outcome(error)))

    def _forget(self, request: Request) -> None:
        del self._requests[request.work.id]
        self._schedule.drop(request)
        request.account.live -= 1
        if request.work.adapter is not None:
            self._adapters.give_back(request.work.adapter)


_NOT_FINITE = (
    "The model's logits are not finite numbers, so nothing can be drawn. The adapter's weights "
    "have probably become too large in training."
)


def _as_outcome(error: Exception) -> TwinkleDaskError:
    if isinstance(error, TwinkleDaskError):
        return error
    if isinstance(error, _OUT_OF_MEMORY):
        log.warning("A request failed for want of memory: %s", error)
        return Saturated("There is not enough memory for this request at the moment.")
    incident = uuid.uuid4().hex
    log.error("A request failed, incident %s", incident, exc_info=error)
    return ServiceFault("An internal error stopped this request.", incident)
