"""Of alerts, on this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SECRET = "/hooks/T0-secret"


class Receiver:
    """An HTTP server that answers as it is told, the last answer for ever."""

    def __init__(self, answers=(200,), held=None):
        self.bodies, self.requests, answers = [], [], list(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):
                body = handler.rfile.read(int(handler.headers["Content-Length"]))
                self.requests.append((handler.path, handler.headers["Content-Type"]))
                if held is not None:
                    held.wait(10)
                answer = answers.pop(0) if len(answers) > 1 else answers[0]
                if answer == 200:
                    self.bodies.append(json.loads(body))
                handler.send_response(answer)
                if 300 <= answer < 400:
                    handler.send_header("Location", "/elsewhere")
                handler.end_headers()

            def do_GET(handler):
                self.requests.append((handler.path, "GET"))
                handler.send_response(200)
                handler.end_headers()

            def log_message(handler, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}{SECRET}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """From now on nobody listens there."""
        self.server.shutdown()
        self.server.server_close()
