"""A call in a member's name by somebody who has only its public key."""

from __future__ import annotations

import hashlib
import ssl
import time
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from secure_fed.transport.connection import KEY_HEADER, SignedRequest, public_key_header


def call_as(address: str, authority: Path, site: str, member: ec.EllipticCurvePublicKey) -> int:
    """Status of a call signed by another key than the member's, whose public half is in its header."""
    body = ActivateNodeRequest(public_key=public_key_to_bytes(member), heartbeat_interval=30).SerializeToString()
    path, digest = "/v1/fleet/activate-node", hashlib.sha256(body).hexdigest()
    request = SignedRequest(site, "POST", path, len(body), digest, time.time_ns() // 1_000_000)
    headers = request.headers(ec.generate_private_key(ec.SECP256R1())) | {KEY_HEADER: public_key_header(member)}
    context = ssl.create_default_context(cafile=str(authority))
    return httpx.post(f"https://{address}{path}", content=body, headers=headers, verify=context).status_code
