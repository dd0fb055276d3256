"""What people read when a budget or a policy refuses, in their language.

The texts are gettext catalogues (``locale/LANGUAGE/LC_MESSAGES/dpfa.po``), read with Babel; the
English text is the key. Numbers and dates are written as the language writes them.
"""

from dpfa_jax.messages.catalogue import LANGUAGES, N_, Message, language, number

__all__ = ["LANGUAGES", "N_", "Message", "language", "number"]
