"""The protocol spoken by hand: repeats, gaps and encodings that the SDK makes only by accident."""

from types import TracebackType
from typing import Any, Self

import httpx
import zstandard
from tinker import types
from tinker.proto import tinker_public_pb2 as pb
from tinker.proto.request_conv import forward_backward_request_to_proto

PROTOBUF = "application/x-protobuf"

# Generated without types that pyright can follow.
_Output: Any = pb.ForwardBackwardOutput


class Wire:
    """One connection of a tenant."""

    def __init__(self, url: str, key: str) -> None:
        self._http = httpx.Client(
            base_url=f"{url}/api/v1/", headers={"x-api-key": key}, timeout=45.0
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return self._http.post(path, json=body)

    def get(self, path: str) -> httpx.Response:
        return self._http.get(path)

    def request(self, method: str, path: str, json: Any = None) -> httpx.Response:
        return self._http.request(method, path, json=json)

    def send(self, path: str, content: bytes, headers: dict[str, str]) -> httpx.Response:
        """Post a body as it is."""
        return self._http.post(path, content=content, headers=headers)

    def promise(self, path: str, body: dict[str, Any]) -> str:
        """Submit; gives the id of the request."""
        return _request_id(self.post(path, body))

    def forward_backward(
        self,
        run: str,
        seq: int,
        data: list[types.Datum],
        loss: types.LossFnType = "cross_entropy",
        *,
        zstd: bool = False,
    ) -> str:
        """Submit a batch as one request, however large; gives the id of the request."""
        content = forward_backward_bytes(run, seq, data, loss)
        headers = {"content-type": PROTOBUF}
        if zstd:
            content = zstandard.compress(content)
            headers["content-encoding"] = "zstd"
        return _request_id(self.send("forward_backward", content, headers))

    def optim_step(self, run: str, seq: int, learning_rate: float = 1e-2) -> str:
        adam = {"learning_rate": learning_rate}
        return self.promise("optim_step", {"model_id": run, "seq_id": seq, "adam_params": adam})

    def wait(self, request_id: str) -> httpx.Response:
        """The final answer to a poll, asked for as often as it takes."""
        while True:
            headers = {"accept": f"{PROTOBUF}, application/json"}
            answer = self._http.post(
                "retrieve_future", json={"request_id": request_id}, headers=headers
            )
            if answer.status_code != 408:
                assert answer.status_code == 200, answer.text
                return answer

    def result(self, request_id: str) -> dict[str, Any]:
        """A result that is JSON."""
        return self.wait(request_id).json()

    def metrics(self, request_id: str) -> dict[str, float]:
        """The metrics of a forward_backward."""
        answer = self.wait(request_id)
        assert answer.headers["content-type"] == PROTOBUF
        return dict(_Output.FromString(answer.content).metrics)


def forward_backward_bytes(
    run: str, seq: int, data: list[types.Datum], loss: types.LossFnType = "cross_entropy"
) -> bytes:
    """The body of a ``forward_backward`` as the SDK writes it."""
    message = types.ForwardBackwardRequest(
        model_id=run,
        seq_id=seq,
        forward_backward_input=types.ForwardBackwardInput(data=data, loss_fn=loss),
    )
    return forward_backward_request_to_proto(message).SerializeToString()


def _request_id(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["request_id"]
