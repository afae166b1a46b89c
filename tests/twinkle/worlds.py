"""What a tenant has on a server, made by plain requests, and a valid call of every route on it."""

import json
import time
from dataclasses import dataclass
from typing import Any

import requests
from adapters import BATCH
from twinkle.dataset import DatasetMeta
from twinkle_client.common.serialize import serialize_object

from tests.twinkle.conftest import MODEL

MODEL_AT = "/api/v1/model/{model_id}/twinkle/"
SAMPLER_AT = "/api/v1/sampler/{model_id}/twinkle/"
PROCESSOR_AT = "/api/v1/processor/twinkle/"
TWINKLE_AT = "/api/v1/twinkle/"


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call; texts with ``$`` before a slot's name stand for what a tenant has.

    Attributes:
        body: None for a call without a body.
        session: It lives in a session.
        place: What stands in the address besides the model.
    """

    body: dict[str, Any] | None = None
    session: bool = False
    place: dict[str, str] | None = None

    @property
    def slots(self) -> set[str]:
        """What it names of its tenant's."""
        texts = _texts([self.body, self.place])
        named = {text[1:] for text in texts if text.startswith("$")}
        return named | ({"session"} if self.session else set())


def _texts(value: Any) -> list[str]:
    match value:
        case str():
            return [value]
        case dict():
            return [text for each in value.values() for text in _texts(each)]
        case list():
            return [text for each in value for text in _texts(each)]
        case _:
            return []


def _on_adapter(**more: Any) -> Call:
    return Call(body={"adapter_name": "$adapter", **more}, session=True)


_LORA = json.dumps({"r": 4, "target_modules": "all-linear"})
_POLITE = {"max_tokens": 1, "seed": 1}
_TALK: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], **_POLITE}
_PLACE = {"run_id": "$run", "checkpoint_id": "$checkpoint"}

#: A valid call of each route that names something of its tenant's, in an order in which they work.
#: Several for a route that takes the same thing under several names.
CALLS: dict[str, list[Call]] = {
    **{
        f"POST {MODEL_AT}{tail}": calls
        for tail, calls in {
            "add_adapter_to_model": [
                Call(body={"adapter_name": "fresh", "config": _LORA}, session=True)
            ],
            "set_template": [_on_adapter(template_cls="Template")],
            "set_processor": [_on_adapter(processor_cls="InputProcessor")],
            "set_loss": [_on_adapter(loss_cls="CrossEntropyLoss")],
            "set_optimizer": [_on_adapter(optimizer_cls="AdamW")],
            "set_lr_scheduler": [_on_adapter(scheduler_cls="LinearLR")],
            "add_metric": [_on_adapter(metric_cls="LossMetric")],
            "forward_only": [_on_adapter(inputs=BATCH)],
            "forward": [_on_adapter(inputs=BATCH)],
            "calculate_loss": [_on_adapter()],
            "backward": [_on_adapter()],
            "forward_backward": [_on_adapter(inputs=BATCH)],
            "clip_grad_norm": [_on_adapter()],
            "step": [_on_adapter()],
            "lr_step": [_on_adapter()],
            "zero_grad": [_on_adapter()],
            "clip_grad_and_step": [_on_adapter()],
            "calculate_metric": [_on_adapter()],
            "get_train_configs": [_on_adapter()],
            "get_state_dict": [_on_adapter()],
            "save": [_on_adapter(name="again")],
            "load": [_on_adapter(name="$address"), _on_adapter(name="$folder")],
            "resume_from_checkpoint": [_on_adapter(name="$address"), _on_adapter(name="$folder")],
            "apply_patch": [_on_adapter(patch_cls="Patch")],
            "upload_to_hub": [
                Call(body={"checkpoint_dir": "$address", "hub_model_id": "acme/one"}),
                Call(body={"checkpoint_dir": "$folder", "hub_model_id": "acme/two"}),
                Call(
                    body={
                        "checkpoint_dir": {"twinkle_path": "$address"},
                        "hub_model_id": "acme/three",
                    }
                ),
            ],
        }.items()
    },
    f"GET {MODEL_AT}upload_status/{{request_id}}": [Call(place={"request_id": "$upload"})],
    f"POST {SAMPLER_AT}create": [Call(body={}, session=True)],
    f"POST {SAMPLER_AT}set_template": [
        Call(body={"template_cls": "Template", "adapter_name": "said"}, session=True)
    ],
    f"POST {SAMPLER_AT}add_adapter_to_sampler": [
        Call(body={"adapter_name": "said", "adapter_uri": "$spoken"}, session=True),
        Call(body={"adapter_name": "$adapter"}, session=True),
    ],
    **{
        f"POST {SAMPLER_AT}{tail}": [
            Call(
                body={"inputs": {"input_ids": [3, 4]}, "sampling_params": _POLITE, **named},
                session=True,
            )
            for named in ({"adapter_uri": "$spoken"}, {"adapter_name": "$named"})
        ]
        for tail in ("sample", "sample_stream")
    },
    f"POST {SAMPLER_AT}apply_patch": [Call(body={"patch_cls": "Patch"}, session=True)],
    f"POST {PROCESSOR_AT}create": [
        Call(
            body={
                "processor_type": "dataloader",
                "class_type": "DataLoader",
                "dataset": "$dataset",
                "batch_size": 1,
            },
            session=True,
        )
    ],
    f"POST {PROCESSOR_AT}call": [
        Call(body={"processor_id": "$dataset", "function": "__len__"}, session=True),
        Call(body={"processor_id": "$loader", "function": "__len__"}, session=True),
        Call(body={"processor_id": "$loader", "function": "__iter__"}, session=True),
    ],
    f"POST {TWINKLE_AT}session_heartbeat": [Call(body={"session_id": "$session"})],
    f"POST {TWINKLE_AT}weights_info": [
        Call(body={"twinkle_path": "$address"}),
        Call(body={"twinkle_path": "$spoken"}),
    ],
    f"GET {TWINKLE_AT}training_runs/{{run_id}}": [Call(place={"run_id": "$run"})],
    f"GET {TWINKLE_AT}training_runs/{{run_id}}/checkpoints": [Call(place={"run_id": "$run"})],
    f"GET {TWINKLE_AT}checkpoint_path/{{run_id}}/{{checkpoint_id}}": [Call(place=_PLACE)],
    "POST /api/v1/chat/completions": [
        Call(body={"model": "$spoken", **_TALK}),
        Call(body={"model": MODEL, "adapter_uri": "$spoken", **_TALK}),
    ],
    "GET /api/v1/models/{model}": [Call(place={"model": "$spoken"})],
    f"DELETE {TWINKLE_AT}training_runs/{{run_id}}/checkpoints/{{checkpoint_id}}": [
        Call(place=_PLACE)
    ],
}

#: Routes that name nothing that belongs to one tenant.
OF_NOBODY = {
    "POST /api/v1/model/{model_id}/twinkle/create",
    "GET /api/v1/model/{model_id}/healthz",
    "GET /api/v1/twinkle/healthz",
    "GET /api/v1/twinkle/healthz/deep",
    "GET /api/v1/twinkle/get_server_capabilities",
    "GET /api/v1/twinkle/capacity_info",
    "GET /api/v1/twinkle/status",
    "GET /api/v1/twinkle/training_runs",
    "POST /api/v1/twinkle/create_session",
    "GET /api/v1/models",
}
#: Refused to everybody, after it is known whose the adapter is.
NEVER_DONE = {f"POST {MODEL_AT}apply_patch", f"POST {SAMPLER_AT}apply_patch"}


class Tenant:
    """One tenant, by HTTP.

    Attributes:
        has: What calls can name of the tenant's, by slot.
    """

    def __init__(self, url: str, key: str) -> None:
        self._url = url
        self._http = requests.Session()
        self._http.headers["Authorization"] = f"Bearer {key}"
        self.has: dict[str, str] = {}

    def routes(self) -> set[str]:
        """The routes of this face, OpenAI's and the processors', as the server documents them."""
        document = self._http.get(f"{self._url}/api/v1/openapi.json", timeout=30).json()
        return {
            f"{method.upper()} {path}"
            for path, methods in document["paths"].items()
            for method in methods
            if {"twinkle", "model", "models", "chat", "sampler", "processor"} & set(path.split("/"))
        }

    def settle(self, word: str) -> None:
        """Make something of every kind; ``word`` is in the names that a tenant gives itself."""
        has = self.has
        has["session"] = self._make("session_id", f"POST {TWINKLE_AT}create_session", {})
        has["adapter"] = f"adapter-{word}"
        on = {"adapter_name": has["adapter"]}
        model = f"POST {MODEL_AT}"
        has["run"] = self._make(
            "adapter_name", f"{model}add_adapter_to_model", on | {"config": _LORA}
        )
        kept = self.post(f"{model}save", on | {"name": f"kept-{word}", "save_optimizer": True})
        has["address"], has["folder"] = kept["twinkle_path"], kept["checkpoint_dir"]
        has["checkpoint"] = has["address"].removeprefix(f"twinkle://{has['run']}/")
        has["spoken"] = self._make("twinkle_path", f"{model}save", on | {"is_sampler": True})
        has["named"] = f"named-{word}"
        sampled = {"adapter_name": has["named"], "adapter_uri": has["spoken"]}
        self.post(f"POST {SAMPLER_AT}add_adapter_to_sampler", sampled)
        meta = serialize_object(DatasetMeta(data=[{"n": 1}, {"n": 2}]))
        data = {"processor_type": "dataset", "class_type": "Dataset", "dataset_meta": meta}
        has["dataset"] = self._make("processor_id", f"POST {PROCESSOR_AT}create", data)
        loader = {"processor_type": "dataloader", "class_type": "DataLoader", "batch_size": 1}
        loader["dataset"] = has["dataset"]
        has["loader"] = self._make("processor_id", f"POST {PROCESSOR_AT}create", loader)
        upload = {"checkpoint_dir": has["address"], "hub_model_id": f"acme/{word}"}
        has["upload"] = self._make("request_id", f"{model}upload_to_hub", upload)

    def _make(self, told: str, route: str, body: dict[str, Any]) -> str:
        return self.post(route, body)[told]

    def post(self, route: str, body: dict[str, Any]) -> Any:
        """A call that must succeed, in the tenant's session if there is one yet."""
        answer = self.call(route, Call(body=body, session="session" in self.has))
        assert answer.ok, f"{route}: {answer.status_code} {answer.text}"
        return answer.json()

    def call(self, route: str, call: Call, **others: str) -> requests.Response:
        """Carry out a call on what the tenant has; ``others`` stand in place of some of it."""
        has = self.has | others
        method, address = route.split(" ", 1)
        place = {"model_id": MODEL, **_filled(call.place or {}, has)}
        headers = {"X-Twinkle-Session-Id": has["session"]} if call.session else {}
        return self._http.request(
            method,
            self._url + address.format_map(place),
            json=_filled(call.body, has),
            headers=headers,
            timeout=60,
        )

    def send(self, route: str, content: bytes) -> requests.Response:
        """Any bytes as a JSON body, in the tenant's session."""
        method, address = route.split(" ", 1)
        headers = {
            "X-Twinkle-Session-Id": self.has["session"],
            "Content-Type": "application/json",
        }
        return self._http.request(
            method,
            self._url + address.format_map({"model_id": MODEL}),
            data=content,
            headers=headers,
            timeout=10,
        )

    def filled(self, body: dict[str, Any]) -> dict[str, Any]:
        """A call's body with what the tenant has."""
        return _filled(body, self.has)

    def wait_for_uploads(self) -> None:
        """Until the tenant's own upload is over."""
        (status,) = CALLS[f"GET {MODEL_AT}upload_status/{{request_id}}"]
        while True:
            told = self.call(f"GET {MODEL_AT}upload_status/{{request_id}}", status).json()
            if told["status"] not in ("pending", "running"):
                assert told["status"] == "completed", told
                return
            time.sleep(0.05)


def _filled(value: Any, has: dict[str, str]) -> Any:
    match value:
        case str() if value.startswith("$"):
            return has[value[1:]]
        case dict():
            return {name: _filled(each, has) for name, each in value.items()}
        case list():
            return [_filled(each, has) for each in value]
        case _:
            return value
