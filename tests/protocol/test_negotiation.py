"""Features, protocol features, and their order: vhost-user.rst, "Feature negotiation"."""

from __future__ import annotations

import pytest

from tests.protocol.backends import Backend
from tests.protocol.conftest import Factory
from tests.protocol.helpers import check_io
from vhostd.protocol.features import ProtocolFeature, VirtioFeature
from vhostd.virtqueue.block import DRIVER_FEATURES
from vhostd.virtqueue.constants import FrontendRequest
from vhostd.virtqueue.errors import BackendError
from vhostd.virtqueue.frontend import DEFAULT_PROTOCOL_FEATURES

NEEDED = int(
    VirtioFeature.VERSION_1
    | VirtioFeature.PROTOCOL_FEATURES
    | VirtioFeature.INDIRECT_DESC
    | VirtioFeature.EVENT_IDX
    | VirtioFeature.BLK_SEG_MAX
    | VirtioFeature.BLK_BLK_SIZE
    | VirtioFeature.BLK_TOPOLOGY
    | VirtioFeature.BLK_FLUSH
    | VirtioFeature.BLK_CONFIG_WCE
    | VirtioFeature.BLK_MQ
    | VirtioFeature.BLK_DISCARD
    | VirtioFeature.BLK_WRITE_ZEROES
)
NEEDED_PROTOCOL = int(
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.CONFIG
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)


def test_a_complete_disk_is_offered(backend: Backend) -> None:
    with backend.frontend() as frontend:
        frontend.read_offer()
        assert frontend.offered & NEEDED == NEEDED
        assert frontend.offered_protocol & NEEDED_PROTOCOL == NEEDED_PROTOCOL
        assert not frontend.offered & VirtioFeature.BLK_RO


def test_a_read_only_disk_says_so(backend: Backend, backend_with: Factory) -> None:
    with backend_with(read_only=True).frontend() as frontend:
        frontend.read_offer()
        assert frontend.offered & VirtioFeature.BLK_RO


def test_the_number_of_queues_is_told(backend: Backend, backend_with: Factory) -> None:
    assert backend.spec.queues != 2
    with backend.frontend() as frontend:
        frontend.read_offer()
        assert frontend.max_queues == backend.spec.queues
    with backend_with(queues=2).frontend() as frontend:
        frontend.read_offer()
        assert frontend.max_queues == 2


@pytest.mark.parametrize(
    "left_out",
    [
        VirtioFeature.EVENT_IDX,
        VirtioFeature.INDIRECT_DESC,
        VirtioFeature.EVENT_IDX | VirtioFeature.INDIRECT_DESC,
        VirtioFeature.BLK_FLUSH,
        VirtioFeature.BLK_FLUSH | VirtioFeature.BLK_CONFIG_WCE,
        VirtioFeature.BLK_MQ,
        VirtioFeature.BLK_BLK_SIZE | VirtioFeature.BLK_SEG_MAX | VirtioFeature.BLK_SIZE_MAX,
    ],
    ids=lambda flags: "|".join(str(flag.name) for flag in VirtioFeature if flag & flags),
)
def test_a_driver_may_do_without(backend: Backend, left_out: VirtioFeature) -> None:
    with backend.device(features=DRIVER_FEATURES & ~left_out) as device:
        assert not device.features & left_out
        check_io(device, left_out)


def test_a_front_end_without_reply_ack_is_served(backend: Backend) -> None:
    protocol = DEFAULT_PROTOCOL_FEATURES & ~ProtocolFeature.REPLY_ACK
    with backend.device(protocol_features=protocol) as device:
        check_io(device, "no REPLY_ACK")


def test_features_can_be_asked_again(backend: Backend) -> None:
    with backend.device() as device:
        assert device.frontend is not None
        again = device.frontend.ask_u64(FrontendRequest.GET_FEATURES)
        assert again == device.frontend.offered
        check_io(device, "asked again")


def test_every_message_is_answered_with_its_own_result(ours: Backend) -> None:
    """REPLY_ACK: an error of one message does not end the session nor stick to the next.

    Others end the session at the first error (libvhost-user) or do not tell.
    """
    with ours.device() as device:
        frontend = device.frontend
        assert frontend is not None
        with pytest.raises(BackendError, match="SET_VRING_NUM"):
            frontend.tell_vring(FrontendRequest.SET_VRING_NUM, 1, 3)
        frontend.tell_vring(FrontendRequest.SET_VRING_NUM, 1, 4)
        check_io(device, "after an error")


def test_features_that_are_not_offered_are_refused(ours: Backend) -> None:
    """Others accept any bits (libvhost-user keeps what it is given)."""
    with ours.frontend() as frontend:
        frontend.read_offer()
        missing = 1 << 60
        assert not frontend.offered & missing
        with pytest.raises(BackendError, match="SET_FEATURES"):
            frontend.set_features(frontend.offered | missing)
        frontend.set_features(frontend.offered)


def test_reset_device_leaves_a_disk_that_can_be_started_again(ours: Backend) -> None:
    """RESET_DEVICE (34) stops rings and forgets features; libvhost-user does not offer it."""
    with ours.device() as device:
        check_io(device, "before reset")
        frontend = device.frontend
        assert frontend is not None
        assert frontend.has(ProtocolFeature.RESET_DEVICE)
        frontend.tell(FrontendRequest.RESET_DEVICE)
        frontend.set_features(device.features)
        device.queues[0].reset()
        frontend.start_vring(0, device.queues[0])
        check_io(device, "after reset")


def test_status_reports_refused_features(ours: Backend) -> None:
    """With STATUS, FEATURES_OK stays clear when SET_FEATURES asked for too much: virtio 1.3, 3.1.1.

    libvhost-user does not offer STATUS.
    """
    features_ok = 8
    with ours.frontend() as frontend:
        frontend.read_offer()
        assert frontend.has(ProtocolFeature.STATUS)
        extra = (frontend.offered | 1 << 60).to_bytes(8, "little")
        assert frontend.tell_for_result(FrontendRequest.SET_FEATURES, extra) != 0
        frontend.tell_u64(FrontendRequest.SET_STATUS, 3 | features_ok)
        assert not frontend.ask_u64(FrontendRequest.GET_STATUS) & features_ok
        frontend.set_features(frontend.offered)
        frontend.tell_u64(FrontendRequest.SET_STATUS, 3 | features_ok)
        assert frontend.ask_u64(FrontendRequest.GET_STATUS) & features_ok
