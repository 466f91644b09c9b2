"""A guarded diffusers pipeline as a web service: one guard a request, the verdict in the response's headers.

    pip install ".[serve]"
    python -m examples.serving [settings.json] [--host 127.0.0.1] [--port 8000]

Without a settings file it serves the small model that comes with Memorization Guard. ``docs/serving.md`` describes settings,
answers and metrics. From what is set to what is sent:

    settings     what the service runs with, what a client may ask for, and what is done with an image of which verdict
    painter      samples requests, each with a guard and pipeline of its own, and lets a few of them wait
    metrics      what Prometheus is told
    app          addresses, answers and errors
    connections  how many connections there may be, and how slow they may be
    __main__     the command
"""
