"""Options of the whole suite."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--on-cluster",
        action="store_true",
        help="let the black-box tests' shared service use a separate Dask cluster: a scheduler "
        "and two workers, one of which trains and the other samples",
    )
