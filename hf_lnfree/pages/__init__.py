"""Every picture and every HTML page; the only use of matplotlib and jinja2."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
