"""A user's script for SDK 0.16.1 to 0.25; run in one of their environments, it prints JSON.

It takes the address and key from the environment and the model as its argument, goes once through
training, saving, loading, sampling and the REST client, and tells what it got. What to think of
that is the tests' business.
"""

import importlib
import json
import logging
import re
import sys
import time
from typing import Any

import numpy as np
import tinker
import torch
from tinker import types

# Typed as the newest SDK is, which differs here and there from the one that runs.
_sdk: Any = tinker
_types: Any = types
_futures: Any = importlib.import_module("tinker.lib.api_future_impl")
_pools: Any = importlib.import_module("tinker.lib.client_connection_pool_type")

STEP = types.AdamParams(learning_rate=1e-2)


class Requests(logging.Handler):
    """The paths that the SDK asked for, run ids left out."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seen: set[str] = set()
        log = logging.getLogger("httpx")
        log.setLevel(logging.INFO)
        log.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        found = re.search(r"(GET|POST|PUT|DELETE) http://[^/]+(/\S+)", record.getMessage())
        if found:
            path = re.sub(r"session-[^/?]+", "ID", found[2].split("?")[0])
            self.seen.add(f"{found[1]} {path}")


def data() -> list[types.Datum]:
    tokens = [[*range(20 + i, 34 + i)] for i in range(3)]
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(each[:-1]),
            loss_fn_inputs={
                "target_tokens": types.TensorData.from_numpy(np.asarray(each[1:], np.int64)),
                "weights": types.TensorData.from_numpy(np.ones(len(each) - 1, np.float32)),
            },
        )
        for each in tokens
    ]


def loss_of(run: Any) -> float:
    return run.forward(data(), "cross_entropy").result().metrics["loss:sum"]


def logprobs_of(run: Any) -> list[list[float]]:
    outputs = run.forward(data(), "cross_entropy").result().loss_fn_outputs
    return [[float(x) for x in each["logprobs"].data] for each in outputs]


def train(run: Any, steps: int = 1) -> list[float]:
    losses: list[float] = []
    for _ in range(steps):
        forward = run.forward_backward(data(), "cross_entropy")
        step = run.optim_step(STEP)
        losses.append(forward.result().metrics["loss:sum"])
        step.result()
    return losses


def negative_sum(
    data: list[types.Datum], logprobs: list[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    loss = -torch.cat(logprobs).sum()
    return loss, {"custom": float(loss)}


def training(service: Any, model: str, told: dict[str, Any]) -> Any:
    run = service.create_lora_training_client(model, rank=4, seed=1)
    info = run.get_info()
    told["info"] = {"model": info.model_data.model_name, "rank": info.lora_rank}
    told["first_loss"] = loss_of(run)
    told["first_logprobs"] = logprobs_of(run)
    told["losses"] = train(run, 6)
    told["loss_with_defaults"] = (
        run.forward_backward(data(), "cross_entropy").result().metrics["loss:sum"]
    )
    told["optim_metrics"] = run.optim_step(types.AdamParams()).result().metrics
    custom = service.create_lora_training_client(model, rank=4, seed=1)
    told["custom_metrics"] = custom.forward_backward_custom(data(), negative_sum).result().metrics
    custom.optim_step(STEP).result()
    told["custom_loss_after"] = loss_of(custom)
    return run


def checkpoints(service: Any, model: str, run: Any, told: dict[str, Any]) -> None:
    told["state"] = path = run.save_state("kept").result().path
    told["loss_at_save"] = loss_of(run)
    resumed = service.create_training_client_from_state_with_optimizer(path)
    told["loss_resumed"] = loss_of(resumed)
    told["next_resumed"] = [*train(resumed), loss_of(resumed)]
    told["next_straight"] = [*train(run), loss_of(run)]
    weights_only = service.create_training_client_from_state(path)
    told["loss_from_state"] = loss_of(weights_only)
    loaded = service.create_lora_training_client(model, rank=4)
    loaded.load_state(path).result()
    told["loss_loaded"] = loss_of(loaded)


def sampling(service: Any, model: str, run: Any, told: dict[str, Any]) -> None:
    told["sampler_path"] = path = run.save_weights_for_sampler("drawn").result().path
    told["trained_logprobs"] = logprobs_of(run)
    named = service.create_sampling_client(model_path=path)
    prompt = types.ModelInput.from_ints([*range(20, 34)])
    told["compute_logprobs"] = named.compute_logprobs(prompt).result()
    params = types.SamplingParams(max_tokens=5, temperature=0.0)
    answer = named.sample(
        prompt, 2, params, include_prompt_logprobs=True, topk_prompt_logprobs=2
    ).result()
    told["sequences"] = [
        {"tokens": each.tokens, "logprobs": each.logprobs, "stop_reason": each.stop_reason}
        for each in answer.sequences
    ]
    told["prompt_logprobs"] = answer.prompt_logprobs
    told["topk"] = answer.topk_prompt_logprobs
    fresh = run.save_weights_and_get_sampling_client()
    told["ephemeral"] = fresh.sample(prompt, 1, params).result().sequences[0].tokens
    base = service.create_sampling_client(base_model=model)
    told["base"] = base.compute_logprobs(prompt).result()


def records(service: Any, run: Any, told: dict[str, Any]) -> None:
    rest = service.create_rest_client()
    told["capabilities"] = [
        each.model_name for each in service.get_server_capabilities().supported_models
    ]
    told["run"] = rest.get_training_run(run.model_id).result().base_model
    told["runs"] = [
        each.training_run_id for each in rest.list_training_runs(limit=50).result().training_runs
    ]
    told["run_id"] = run.model_id
    told["listed"] = [
        each.tinker_path for each in rest.list_checkpoints(run.model_id).result().checkpoints
    ]
    told["all_listed"] = [
        each.tinker_path for each in rest.list_user_checkpoints(limit=50).result().checkpoints
    ]
    told["weights_info"] = (
        rest.get_weights_info_by_tinker_path(told["state"]).result().model_dump(mode="json")
    )
    session = run.model_id.split(":")[0]
    told["sessions"] = session in rest.list_sessions(limit=50).result().sessions
    told["session_runs"] = rest.get_session(session).result().training_run_ids
    rest.set_checkpoint_ttl_from_tinker_path(told["state"], 7200).result()
    rest.publish_checkpoint_from_tinker_path(told["state"]).result()
    kept = {
        each.tinker_path: each for each in rest.list_checkpoints(run.model_id).result().checkpoints
    }[told["state"]]
    told["published"] = kept.public
    rest.unpublish_checkpoint_from_tinker_path(told["state"]).result()
    archive = rest.get_checkpoint_archive_url_from_tinker_path(told["sampler_path"]).result()
    told["archive"] = {"url": archive.url, "expires": archive.expires.isoformat()}
    rest.delete_checkpoint_from_tinker_path(told["state"]).result()
    told["listed_after_delete"] = [
        each.tinker_path for each in rest.list_checkpoints(run.model_id).result().checkpoints
    ]


def refused(service: Any, told: dict[str, Any]) -> None:
    """What a wrong request raises, by the name of the exception."""

    def name_of(call: Any) -> list[str]:
        try:
            call()
        except Exception as failure:  # noqa: BLE001 - which one is what the tests look at
            return [type(failure).__name__, str(failure)]
        return ["nothing was raised", ""]

    told["unknown_model"] = name_of(lambda: service.create_lora_training_client("no/such"))
    told["unknown_checkpoint"] = name_of(
        lambda: service.create_training_client_from_state(told["state"])
    )


def unload(service: Any, run: Any, told: dict[str, Any]) -> None:
    """Low-level: no public method of these SDKs calls it."""
    holder = service.holder
    pool = _pools.ClientConnectionPoolType.TRAIN

    async def ask() -> Any:
        request = _types.UnloadModelRequest(model_id=run.model_id)
        with holder.aclient(pool) as client:
            promise = await client.models.unload(request=request)
        # Their own futures.retrieve cannot read any answer at 0.25.0.
        return await _futures._APIFuture(
            _types.UnloadModelResponse, holder, promise, time.time(), "UnloadModel"
        ).result_async()

    told["unloaded"] = holder.run_coroutine_threadsafe(ask()).result().model_dump()


def main() -> None:
    told: dict[str, Any] = {"version": _sdk.__version__}
    requests = Requests()
    model = sys.argv[1]
    service: Any = tinker.ServiceClient()
    run = training(service, model, told)
    checkpoints(service, model, run, told)
    sampling(service, model, run, told)
    records(service, run, told)
    refused(service, told)
    unload(service, run, told)
    told["requests"] = sorted(requests.seen)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
