"""The explorer as a local page; the only use of gradio (the extra `app`)."""

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
from starlette.middleware import Middleware

from .explorer import Explorer
from .explorer_panel import panel

EXAMPLE = "for root, _, names in os.walk(folder):\n    for name in names:\n        yield os.path.join(root, name)\n"
NOTHING_FROM_ELSEWHERE = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:"
)
"""What a browser may fetch for the page, as a Content-Security-Policy."""
CSS = """
svg {max-width: 100%; height: auto}
th, td {text-align: right; padding: 0 0.6em}
th:first-child, td:first-child {text-align: left}
"""


class OnlyFromHere:
    """Middleware of ASGI that sends a Content-Security-Policy with every answer."""

    def __init__(self, app: Callable) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", NOTHING_FROM_ELSEWHERE.encode())
                message = {**message, "headers": [*message.get("headers", ()), policy]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


def build_app(explorers: Sequence[Explorer]) -> gr.Blocks:
    """The page: a text, a layer and a head, and below them a panel for each model."""

    def show(text: str, layer: int, head: int) -> Any:
        panels = [panel(explorer, text, layer, head) for explorer in explorers]
        return panels if len(panels) > 1 else panels[0]

    with gr.Blocks(title="hf-lnfree explore", analytics_enabled=False) as app:
        text = gr.Textbox(EXAMPLE, label="Text", lines=6, max_lines=20)
        with gr.Row():
            layer = gr.Number(0, label="Layer", precision=0)
            head = gr.Number(0, label="Head", precision=0)
            button = gr.Button("Show", variant="primary")
        with gr.Row(equal_height=False):
            panels = [gr.HTML() for _ in explorers]
        triggers = [app.load, button.click, text.submit, layer.change, head.change]
        gr.on(triggers, show, [text, layer, head], panels, api_name="show", trigger_mode="always_last")
    return app


def launch(app: gr.Blocks, host: str, port: int | None, browser: bool) -> str:
    """
    Serve the page from a thread of its own.

    Args:
        port: the first free one from 7860 on if None.

    Returns:
        Its address.

    Raises:
        OSError: the port is taken.
    """
    _, address, _ = app.launch(
        server_name=host,
        server_port=port,
        inbrowser=browser,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Base(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
        css=CSS,
        app_kwargs={"middleware": [Middleware(OnlyFromHere)]},
    )
    return address


def wait(app: gr.Blocks) -> None:
    """Until the program is interrupted; the page is closed then."""
    try:
        threading.Event().wait()
    finally:
        app.close(verbose=False)
