"""A web server on loopback that gives one file, with the faults that real ones have."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Serves one file on loopback; `cut` ends a response early, `ranges` says whether it can start in the middle."""

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Answer)
        self.content, self.cut, self.ranges, self.asked = content, None, True, []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/LJSpeech-1.1.tar.bz2"

    def handle_error(self, request, client_address):
        """Say nothing where a client leaves early, as some tests let it."""


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.server.content) - start))
        self.end_headers()
        self.wfile.write(self.server.content[start : self.server.cut])

    def log_message(self, *arguments):
        pass


@contextmanager
def serving(content):
    """A running Server of these bytes."""
    server = Server(content)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
