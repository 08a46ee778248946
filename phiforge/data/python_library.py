"""Real text that needs no network: the Python installation's own documentation and source code.

Call `documentation(modules)` for pages of HTML that pydoc renders in a clean subprocess, and
`source_code(modules)` for the code; both yield (module, text). Writes nothing.
"""

import importlib.util
import json
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

# Pure-Python modules (C parts do not matter) that every Python from 3.11 on has and that import
# without side effects. Fixed, so that the same interpreter always gives the same text.
MODULES = tuple(
    """
    abc argparse ast asyncio.events asyncio.futures asyncio.queues asyncio.streams asyncio.tasks
    base64 bdb bisect calendar cmd code codecs collections collections.abc colorsys
    concurrent.futures configparser contextlib copy csv dataclasses datetime decimal difflib dis
    doctest email.header email.message email.parser email.policy enum filecmp fileinput fnmatch
    fractions ftplib functools gettext glob graphlib gzip hashlib heapq hmac html html.parser
    http http.client http.cookies http.server imaplib inspect io ipaddress itertools json
    json.decoder json.encoder keyword linecache locale logging logging.config logging.handlers
    mailbox math mimetypes multiprocessing.pool multiprocessing.queues netrc numbers operator
    optparse os pathlib pdb pickle pickletools pkgutil plistlib poplib pprint profile pstats
    py_compile queue quopri random re reprlib sched secrets selectors shelve shlex shutil smtplib
    socketserver sqlite3 ssl statistics string struct subprocess symtable tarfile tempfile
    textwrap threading timeit token tokenize trace traceback types typing unittest unittest.case
    unittest.mock urllib.parse urllib.request urllib.robotparser uuid warnings wave weakref
    xml.dom.minidom xml.etree.ElementTree xml.sax.handler xmlrpc.client xmlrpc.server zipapp
    zipfile
    """.split()
)

# Runs in a clean interpreter: no site packages, no environment. Left out: values of this machine
# (paths, limits, the environment), lists of imports, and what every class has.
_RENDER = r"""
import importlib, json, pydoc, sys
class Pages(pydoc.HTMLDoc):
    def filelink(self, url, path): return ""
    def getdocloc(self, *args, **kwargs): return None
    def docother(self, *args, **kwargs): return ""
    def heading(self, title, *args): return "<h1>%s</h1>" % title
    def bigsection(self, title, cls, contents, *args):
        if title in ("Modules", "Data", "Package Contents"): return ""
        return "<h2>%s</h2><div>%s</div>" % (title, contents)
    def section(self, title, cls, contents, width=6, prelude="", *args, **kwargs):
        return "<h3>%s</h3><div>%s</div><div>%s</div>" % (title, prelude, contents)
    def docdata(self, object, name=None, *args, **kwargs):
        if name in ("__dict__", "__weakref__"): return ""
        return super().docdata(object, name, *args, **kwargs)
pages = Pages()
for name in json.loads(sys.argv[1]):
    try:
        module = importlib.import_module(name)
        html = pages.page(name, pages.document(module, name))
        print(json.dumps({"module": name, "html": html}))
    except Exception as error:
        print(json.dumps({"module": name, "error": f"{type(error).__name__}: {error}"}))
"""
_ADDRESS = re.compile(r"( |&nbsp;)(at( |&nbsp;))?0x[0-9a-fA-F]{6,}")
_EMPTY = re.compile(r"Data (and other attributes|descriptors) [^:]*:<br>\s*(?=<(hr|/div))")


def documentation(modules: Sequence[str] = MODULES) -> Iterator[tuple[str, str]]:
    """Yield (module, HTML page) as pydoc writes it, without machine paths or addresses.

    Raises ValueError naming a module that cannot be imported or an interpreter without docstrings.
    """
    if sys.flags.optimize >= 2:
        raise ValueError("python-docs: Python runs with -OO, which drops docstrings; run without")
    command = [sys.executable, "-s", "-S", "-P", "-X", "utf8", "-c", _RENDER, json.dumps(modules)]
    # Nothing of the caller's environment: home and terminal width would show in the pages, and the
    # order of sets must be the same every time.
    environment = {"PYTHONHASHSEED": "0", "LC_ALL": "C", "COLUMNS": "80", "HOME": "/", "PATH": ""}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=300, check=False)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ValueError(
            f"python-docs: pydoc under {sys.executable} ended with code {done.returncode}: "
            f"{''.join(last)}; check the Python installation"
        )
    for line in done.stdout.decode().splitlines():
        row = json.loads(line)
        if "error" in row:
            raise ValueError(
                f"python-docs: module {row['module']!r}: {row['error']}; remove it from `modules`, "
                "or complete the Python installation"
            )
        yield row["module"], _anonymous(row["html"])


def source_code(modules: Sequence[str] = MODULES) -> Iterator[tuple[str, str]]:
    """Yield (module, source code), for the modules of the list that are written in Python.

    Raises ValueError when a module does not exist or its source is not installed.
    """
    library = Path(sysconfig.get_paths()["stdlib"]).resolve()
    for name in modules:
        try:
            spec = importlib.util.find_spec(name)
        except ImportError:
            spec = None
        if spec is None:
            raise ValueError(f"python-source: no module {name!r}; remove it from `modules`")
        origin = Path(spec.origin or "")
        if origin.suffix != ".py" and spec.origin != "frozen":
            continue  # written in C
        path = origin if origin.suffix == ".py" else _library_file(library, name)
        if not path.is_file():
            raise ValueError(
                f"{path}: the source of module {name!r} is not installed; install Python with its "
                "standard library, or remove the source from the recipe"
            )
        yield name, path.read_text(encoding="utf-8")


def _library_file(library: Path, name: str) -> Path:
    path = library.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _anonymous(html: str) -> str:
    """Strip what tells one machine or run from another."""
    for prefix in {sys.prefix, sys.base_prefix, sys.exec_prefix}:
        if len(prefix) > len("/usr"):
            html = html.replace(prefix, "/usr")
    # pydoc escapes the values of defaults twice.
    html = html.replace("&amp;lt;", "&lt;").replace("&amp;gt;", "&gt;")
    return _EMPTY.sub("", _ADDRESS.sub("", html))
