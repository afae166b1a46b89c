"""What all answers have in common."""

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """An answer; clients ignore fields they do not know."""

    model_config = ConfigDict(protected_namespaces=())


class Fine(Answer):
    """Nothing else to say."""

    status: str = "ok"
