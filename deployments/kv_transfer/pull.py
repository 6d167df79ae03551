"""One hand-off on its way here: asked for once, and brought part by part as they are complete."""

from collections.abc import Iterator
from functools import partial
from queue import Empty, SimpleQueue

from torch import Tensor

from deployments.errors import TransferError
from deployments.kv_transfer.base import Arrival, TransferConfig
from deployments.kv_transfer.inquiries import Announced, Answer, Heard, Inquiries, Want
from deployments.kv_transfer.link import Job, LinkLostError
from deployments.kv_transfer.notes import Note, decode
from deployments.kv_transfer.receiver import Receiver, RemoteHandoff


class _Question:
    """What was asked; what comes of one that was asked again is not heard any more."""

    def __init__(self, want: Want) -> None:
        self.want = want


class Pull:
    """See `Arrivals`.

    Args:
        receiver: of the process.
        handoff: what is brought.
        is_read: its chunks are read where they are, see `Receiver.reads`.
        config: bounds of the waits.
    """

    def __init__(self, receiver: Receiver, handoff: RemoteHandoff, is_read: bool, config: TransferConfig) -> None:
        self._receiver = receiver
        self._handoff = handoff
        self._config = config
        self._num_layers = handoff.layout.chunk_shape(0)[0]
        self._heard: SimpleQueue[tuple[_Question, Heard]] = SimpleQueue()
        self._is_over = False
        self._inquiries: Inquiries | None = None
        self._questions: dict[Want, _Question] = {}
        # A link that is lost is replaced, but not again and again without anything coming.
        self._may_ask_again = True
        # Parts that have come, by chunk and first layer, and chunks that were given back.
        self._come: set[tuple[int, int]] = set()
        self._released: set[int] = set()
        # Of chunks in parts, as they lie at the source.
        self._views: dict[int, Tensor] = {}
        self._has_asked_for_rest = not is_read
        self._ask(Want.LOOK if is_read else Want.SEND)

    def __iter__(self) -> Iterator[Arrival]:
        """See `Arrivals`."""
        while self._questions:
            arrival = self._next()
            if arrival is not None:
                yield arrival
            # Else this name would keep the part until the next one comes.
            del arrival

    def release(self, index: int) -> None:
        """See `Arrivals`."""
        self._released.add(index)
        if self._inquiries is not None:
            self._inquiries.release(self._handoff.object_id, index)

    def close(self) -> None:
        """Nobody waits for it any more: what still comes is dropped."""
        self._is_over = True
        self._drop()

    def _ask(self, want: Want) -> None:
        question = self._questions[want] = _Question(want)
        self._inquiries = self._receiver.inquiries_at(self._handoff, self._config, want is not Want.LOOK)
        self._inquiries.ask(want, self._handoff.object_id, partial(self._hear, question), self._receiving)

    def _receiving(self, text: str) -> Job:
        """How a part is received of which the source has said this."""
        return partial(self._receiver.receive, self._handoff, text)

    def _hear(self, question: _Question, heard: Heard) -> None:
        """Called from other threads."""
        self._heard.put((question, heard))
        if self._is_over:
            self._drop()

    def _drop(self) -> None:
        while True:
            try:
                self._heard.get_nowait()
            except Empty:
                return

    def _next(self) -> Arrival | None:
        """Wait for what is heard next; None: no part has come with it."""
        question, heard = self._heard.get()
        if self._questions.get(question.want) is not question:
            return None
        try:
            if isinstance(heard, Announced):
                return self._bring(heard)
            if isinstance(heard, TransferError):
                raise heard
            if heard is Answer.GONE:
                raise TransferError("the source no longer has it")
            if heard is Answer.AWAY:
                if not self._has_asked_for_rest:
                    self._has_asked_for_rest = True
                    self._ask(Want.REST)
            else:
                del self._questions[question.want]
        except LinkLostError as error:
            # The source closed its end while nothing was under way, or was restarted. It tells of all that it has.
            if not self._may_ask_again:
                raise self._failure(error) from None
            self._may_ask_again = False
            self._ask(question.want)
        except TransferError as error:
            raise self._failure(error) from None
        return None

    def _failure(self, error: TransferError) -> TransferError:
        self._receiver.counters.add(num_failed=1)
        # A new exception: the link's other jobs may hold the old one.
        return TransferError(f"KV from engine {self._handoff.source_id}: {error}")

    def _bring(self, announced: Announced) -> Arrival | None:
        note, tensor = decode(announced.note), None
        if announced.arriving is not None:
            tensor = announced.arriving.result()
        layers = note.layers or (0, self._num_layers)
        part = note.index, layers[0]
        if part in self._come:
            if note.index in self._released:  # which was said over a line that was lost
                self.release(note.index)
            return None
        self._may_ask_again = True
        self._come.add(part)
        is_lent, ends_chunk = tensor is None, layers[1] == self._num_layers
        if tensor is None:
            tensor = self._view(note, layers)
            self._receiver.counters.add(num_received_bytes=tensor.nbytes, num_read_in_place=int(ends_chunk))
        self._receiver.counters.add(num_received=int(ends_chunk))
        return Arrival(note.chunk, tensor, announced.complete_s, note.num_parts, is_lent)

    def _view(self, note: Note, layers: tuple[int, int]) -> Tensor:
        """A part where it lies; parts of one chunk are views of one, so that they can be imported as one."""
        whole = self._views.pop(note.index, None)
        if whole is None:
            whole = self._receiver.view(self._handoff, note)
        if whole is None:
            raise TransferError("its process is gone")
        if layers[1] < self._num_layers:
            self._views[note.index] = whole
        return whole if note.layers is None else whole[slice(*layers)]
