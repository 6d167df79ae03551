"""What the link between two engines gives by itself: `ncclSend` and `cudaMemcpyPeer`, nothing of this project."""

import statistics
from typing import Any

import ray
import torch

_REPEATS = 10


def nccl_variables(rank: int, *, sockets: bool) -> dict[str, str]:
    """What the environment of a rank says to NCCL.

    Args:
        rank: among those on this machine.
        sockets: go over loopback sockets, as hosts without a faster network do: each rank claims to be on a host of its
            own. On one GPU there is no other way, since NCCL knows no two ranks of one GPU.
    """
    variables = {"NCCL_NVLS_ENABLE": "0"}  # multicast needs rights that lent machines do not give
    if sockets:
        variables |= {"NCCL_HOSTID": f"host-{rank}", "NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}
        variables |= {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    return variables


def memcpy_peer_s(nbytes: int) -> float:
    """Median seconds of `cudaMemcpyPeerAsync` from the first GPU to the second."""
    from cupy.cuda import runtime

    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device="cuda:0")
    target = torch.empty(nbytes, dtype=torch.uint8, device="cuda:1")
    target.copy_(source)  # lets either GPU reach the other's memory; without that a copy goes through the host
    torch.cuda.synchronize(0)
    found: list[float] = []
    with torch.cuda.device(0):
        stream = torch.cuda.current_stream()
        for _ in range(_REPEATS + 1):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            runtime.memcpyPeerAsync(target.data_ptr(), 1, source.data_ptr(), 0, nbytes, stream.cuda_stream)
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1e3)
    assert torch.equal(source.cpu(), target.cpu())
    return statistics.median(found[1:])


@ray.remote
class NcclRank:
    """One end of a communicator of two."""

    def unique_id(self) -> Any:
        from cupy.cuda import nccl

        return nccl.get_unique_id()

    def join(self, unique_id: Any, rank: int) -> None:
        from cupy.cuda import nccl

        self._rank = rank
        self._comm = nccl.NcclCommunicator(2, unique_id, rank)
        self._byte = nccl.NCCL_UINT8

    def transfer_s(self, nbytes: int) -> float:
        """Median seconds of one message from rank 0 to rank 1, on the GPU's clock; both ends call it at once.

        Each is timed behind a byte the other way: the sender's clock then starts when the receiver waits.
        """
        tensor = torch.full((nbytes,), self._rank, dtype=torch.uint8, device="cuda")
        byte = torch.empty(1, dtype=torch.uint8, device="cuda")
        stream, peer = torch.cuda.current_stream(), 1 - self._rank
        found: list[float] = []
        for _ in range(_REPEATS + 1):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            there, back = (self._comm.send, self._comm.recv) if self._rank == 0 else (self._comm.recv, self._comm.send)
            back(byte.data_ptr(), 1, self._byte, peer, stream.cuda_stream)
            begin.record()
            there(tensor.data_ptr(), nbytes, self._byte, peer, stream.cuda_stream)
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1e3)
        assert not tensor.any(), "the receiver holds other bytes than the sender"
        return statistics.median(found[1:])


def nccl_send_s(sizes: list[int], num_gpus: float, *, sockets: bool) -> dict[int, float]:
    """Median seconds of `ncclSend` by size, between two processes.

    Args:
        sizes: bytes of a message.
        num_gpus: that Ray counts for each process.
        sockets: see `nccl_variables`.
    """
    actor_class: Any = NcclRank
    ranks = [
        actor_class.options(num_gpus=num_gpus, runtime_env={"env_vars": nccl_variables(rank, sockets=sockets)}).remote()
        for rank in range(2)
    ]
    unique_id = ray.get(ranks[0].unique_id.remote())
    ray.get([actor.join.remote(unique_id, rank) for rank, actor in enumerate(ranks)])
    found = {}
    for size in sizes:
        _, found[size] = ray.get([actor.transfer_s.remote(size) for actor in ranks])
    for actor in ranks:
        ray.kill(actor)
    return found
