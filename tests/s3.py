"""S3 on loopback: moto's server, whose connections can be watched and cut."""

import json
import logging
import socket
import threading

import boto3
from moto import settings
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
KEYS = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1"}


class S3:
    """before: called with method and path of every request; a ConnectionError there ends the connection.

    cut: so many downloads lose their second half.
    """

    def __init__(self):
        self.reset()
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def reset(self):
        self.before, self.cut = lambda method, path: None, 0
        self.check_permissions(False)

    def __call__(self, environ, start_response):
        try:
            self.before(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        except ConnectionError:
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise
        answer = self._app(environ, start_response)
        if self.cut and environ["REQUEST_METHOD"] == "GET" and "list-type" not in environ["QUERY_STRING"]:
            self.cut -= 1
            return self._half(answer)
        return answer

    @staticmethod
    def _half(answer):
        content = b"".join(answer)
        yield content[: len(content) // 2]
        raise ConnectionResetError("cut")

    @property
    def environment(self):
        """What a process needs to use it."""
        return {**KEYS, "AWS_ENDPOINT_URL": self.url}

    def client(self, service="s3", **keys):
        return boto3.client(service, endpoint_url=self.url, **keys)

    def objects(self, bucket):
        """Size of every object."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return {one["Key"]: one["Size"] for page in pages for one in page.get("Contents", ())}

    def check_permissions(self, on):
        """Whether what a user may do is looked up; before that, every key may do all."""
        settings.INITIAL_NO_AUTH_ACTION_COUNT = 0 if on else float("inf")

    def user(self, name, *actions):
        """Keys of a new user who may do only these."""
        iam = self.client("iam")
        iam.create_user(UserName=name)
        statement = {"Effect": "Allow", "Action": list(actions), "Resource": "*"}
        policy = {"Version": "2012-10-17", "Statement": [statement]}
        iam.put_user_policy(UserName=name, PolicyName=name, PolicyDocument=json.dumps(policy))
        key = iam.create_access_key(UserName=name)["AccessKey"]
        return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}

    def close(self):
        self._server.shutdown()
        self._server.server_close()
