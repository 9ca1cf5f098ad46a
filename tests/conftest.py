import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        '--all-variants',
        action='store_true',
        help="run timm's own test suite on every variant, 8 minutes or more, and not on the smaller ones alone",
    )
