"""Templates for the rows of data sets: the served models by name, their tokenizers found here."""

from collections.abc import Mapping, Sequence

from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.processor import templates
from twinkle_dask.processor.rows import Encode
from twinkle_dask.processor.templates import TemplateSpec
from twinkle_dask.processor.tokenizers import tokenizer_of
from twinkle_dask.types import Json

#: Served models: name to the source that workers load.
Models = Mapping[str, str]


def encoder(template: Json | None, models: Models) -> Encode:
    """How rows are encoded; without a template, by refusing.

    Args:
        template: The arguments that it is made with, and its class as ``template``.
        models: Those that ``model_id`` may name.

    Raises:
        InvalidRequest: Wrong arguments, or no such model.
    """
    if template is None:
        return _no_template
    source, spec = _parts(template, models)

    def encode(_template: Json, row: Json, prompt: bool) -> list[Json]:
        tokenizer = tokenizer_of(source)
        try:
            return templates.encode(tokenizer, spec, [row], add_generation_prompt=prompt)
        except (InvalidRequest, NotSupported) as error:
            raise type(error)(error.message.removeprefix("Trajectory 0: ")) from error

    return encode


def decode_tokens(template: Json, models: Models, tokens: Sequence[int]) -> str:
    """Tokens as text, with special tokens."""
    source, _ = _parts(template, models)
    return templates.decode(tokenizer_of(source), [tokens])[0]


def packing_length(template: Json) -> int:
    """Tokens of a packed row: the template's ``max_length``."""
    given = template.get("max_length", TemplateSpec().max_length)
    return int(given or _UNBOUNDED_PACKING)


#: Where a template has no bound.
_UNBOUNDED_PACKING = 2048


def _parts(template: Json, models: Models) -> tuple[str, TemplateSpec]:
    arguments = {key: value for key, value in template.items() if key != "template"}
    named = arguments.get("model_id")
    if not isinstance(named, str):
        raise InvalidRequest("A template needs a model_id, the name of a served model.")
    name = named.removeprefix("ms://").removeprefix("hf://")
    if name not in models:
        raise InvalidRequest(
            f"Model {name[:80]!r} is not served here. Served: {', '.join(sorted(models))}."
        )
    spec = templates.template_spec(str(template["template"]), arguments, base_model=name)
    return models[name], spec


def _no_template(_template: Json, _row: Json, _prompt: bool) -> list[Json]:
    raise InvalidRequest("Call set_template() first.")
