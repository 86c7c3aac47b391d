// The C library's heap, set for a server.
#ifndef TERN_SERVER_BASE_ALLOCATOR_H_
#define TERN_SERVER_BASE_ALLOCATOR_H_

namespace tern {

// Makes malloc keep up to 16 MiB of freed memory at the end of each of its arenas, and take blocks
// of up to 4 MiB from there. By default glibc gives 128 KiB and more back to the system at once,
// and every decoded image (562 KB at 500 x 375) takes its pages anew: 0.5 ms of 1.6 ms for decoding
// and preprocessing one. One arena per CPU, at least two, not glibc's eight: each keeps what it has
// freed, and threads of loads and requests leave their pages in all of them. Call once, before
// threads start. Does nothing with other C libraries.
void KeepFreedMemory();

// Gives all free pages back to the system: after the start and after each unloaded version, whose
// parts are freed all over the heap.
// Thread safe; takes about a millisecond per 100 MB of heap.
void ReturnFreedMemory();

}  // namespace tern

#endif  // TERN_SERVER_BASE_ALLOCATOR_H_
