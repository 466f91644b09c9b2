"""The command: ``python -m examples.serving``."""

import argparse
from typing import Any

import uvicorn

from .app import create_app
from .connections import Server, limited
from .metrics import Metrics
from .settings import Settings, SettingsError, read_settings


def server(settings: Settings, **config: Any) -> uvicorn.Server:
    """The service behind its limits on connections.

    Raises:
        SettingsError: if it cannot run with these settings.
    """
    metrics = Metrics()
    app = create_app(settings, metrics)
    return Server(uvicorn.Config(app, **limited(settings, metrics), **config))


def main() -> None:
    parser = argparse.ArgumentParser(prog="serving", description="Serve guarded images over HTTP.")
    parser.add_argument("settings", nargs="?", help="JSON file; without one the lab model is served")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    try:
        settings = read_settings(arguments.settings) if arguments.settings else Settings()
        service = server(settings, host=arguments.host, port=arguments.port)
    except SettingsError as error:
        raise SystemExit(f"serving: {error}") from None
    service.run()


if __name__ == "__main__":
    main()
