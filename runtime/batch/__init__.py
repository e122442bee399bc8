"""Many pictures and questions at once, offline: rows in, answers out, on engines that Ray Data feeds.

:mod:`rows` (what is asked, in pieces) -> :mod:`worker` (an engine in a process of its own) -> :mod:`journal` (what was
answered, one line each). :mod:`job` puts them together; it alone imports Ray. Extra ``ray``.
"""
