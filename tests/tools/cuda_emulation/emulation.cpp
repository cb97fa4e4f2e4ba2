// The scheduler behind cuda_runtime.h: fibers, barriers, warps' meetings, shared memory.
#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace ifr::cuda {
constexpr size_t MOST_SHARED = 232448, GUARD = 4096;
thread_local uint4 dynamic_shared_memory[(MOST_SHARED + GUARD) / sizeof(uint4)];
}  // namespace ifr::cuda

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {
namespace {

constexpr size_t STACK = 64 << 10;
constexpr unsigned char POISON = 0xff;

struct Fiber {
  std::unique_ptr<char[]> stack{new char[STACK]};
  ucontext_t context;
  jmp_buf place;
  uint3 thread;
  bool started, done, arrived_at_cluster;
  unsigned cluster_phase;
};

struct Meeting {
  unsigned mask, arrived = 0, left = 0;
  std::string call;
  uint64_t values[32];
};

struct Block {
  uint3 index;
  std::vector<char> shared;  // while another block of the cluster runs
  std::vector<Fiber> fibers;
  std::vector<std::list<Meeting>> meetings;  // of each warp
  unsigned arrived, phase, live;
};

struct Cluster {
  std::vector<Block> blocks;
  unsigned rank, arrived, phase;
} cluster;

const std::function<void()> *body;
Block *block;
Fiber *fiber;
jmp_buf scheduler;
uint64_t progress;  // counts arrivals and exits: where it stands still, everybody waits
std::string failure;
std::map<const void *, size_t> allowed;

struct Memory {
  char *start = nullptr;
  size_t size = 0;
};

// This library's thread-local memory, which is the running block's shared memory.
Memory shared_memory() {
  *reinterpret_cast<volatile char *>(ifr::cuda::dynamic_shared_memory);  // a thread's first access allocates it
  Memory found;
  dl_iterate_phdr(
      [](dl_phdr_info *info, size_t, void *result) {
        const auto own = reinterpret_cast<uintptr_t>(&shared_memory);
        bool ours = false;
        size_t size = 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto &part = info->dlpi_phdr[i];
          if (part.p_type == PT_LOAD && own - info->dlpi_addr - part.p_vaddr < part.p_memsz) ours = true;
          if (part.p_type == PT_TLS) size = part.p_memsz;
        }
        if (ours) *static_cast<Memory *>(result) = {static_cast<char *>(info->dlpi_tls_data), size};
        return int(ours);
      },
      &found);
  return found;
}

void yield() {
  if (_setjmp(fiber->place) == 0) _longjmp(scheduler, 1);
}

[[noreturn]] void fail(const std::string &what) {
  if (failure.empty())
    failure = what + ", block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x);
  ++progress;
  for (;;) yield();
}

void fiber_main() {
  (*body)();
  fiber->done = true;
  --block->live;
  ++progress;
  yield();
}

void resume(Fiber &next) {
  fiber = &next;
  threadIdx = next.thread;
  if (_setjmp(scheduler) != 0) return;
  if (next.started) _longjmp(next.place, 1);
  next.started = true;
  setcontext(&next.context);
}

void prepare(Block &b, uint3 index, bool backwards) {
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  b.index = index;
  b.arrived = b.phase = 0;
  b.live = threads;
  b.meetings.assign((threads + 31) / 32, {});
  b.fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    const unsigned t = backwards ? threads - 1 - i : i;
    Fiber &f = b.fibers[i];
    f.thread = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
    f.started = f.done = f.arrived_at_cluster = false;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = STACK;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
  }
}

// Until all of the block's threads have left or wait for another block.
void run_block(Block &b) {
  block = &b;
  blockIdx = b.index;
  for (uint64_t before = progress + 1; before != progress && failure.empty();) {
    before = progress;
    for (size_t i = 0; i < b.fibers.size() && failure.empty(); ++i)
      if (!b.fibers[i].done) resume(b.fibers[i]);
  }
}

void run_cluster(const Memory &memory, size_t dynamic, bool backwards) {
  auto &blocks = cluster.blocks;
  const char *end = reinterpret_cast<char *>(ifr::cuda::dynamic_shared_memory) + dynamic;
  const std::string guard(ifr::cuda::GUARD, POISON);
  for (auto &b : blocks) b.shared.assign(memory.size, POISON);
  cluster.arrived = cluster.phase = 0;
  for (unsigned live = 1; live > 0 && failure.empty();) {
    const uint64_t before = progress;
    live = 0;
    for (unsigned i = 0; i < blocks.size() && failure.empty(); ++i) {
      cluster.rank = backwards ? unsigned(blocks.size()) - 1 - i : i;
      Block &b = blocks[cluster.rank];
      if (b.live == 0) continue;
      std::memcpy(memory.start, b.shared.data(), memory.size);
      run_block(b);
      if (failure.empty() && guard.compare(0, guard.size(), end, guard.size()) != 0)
        failure = "a write past the dynamic shared memory, block " + std::to_string(b.index.x);
      if (b.live > 0)
        std::memcpy(b.shared.data(), memory.start, memory.size);
      else
        std::fill(b.shared.begin(), b.shared.end(), char(POISON));  // nobody may read it any more
      live += b.live;
    }
    if (live > 0 && progress == before && failure.empty())
      failure = "deadlock: " + std::to_string(live) + " thread(s) wait for ever, block " + std::to_string(blockIdx.x);
  }
}

}  // namespace

unsigned lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32; }

void block_barrier() {
  const unsigned phase = block->phase;
  ++progress;
  if (++block->arrived == block->fibers.size()) block->arrived = 0, ++block->phase;
  while (block->phase == phase) yield();
}

void cluster_arrive() {
  if (fiber->arrived_at_cluster) fail("arrived twice at the cluster's barrier");
  fiber->arrived_at_cluster = true;
  fiber->cluster_phase = cluster.phase;
  ++progress;
  if (++cluster.arrived == cluster.blocks.size() * block->fibers.size()) cluster.arrived = 0, ++cluster.phase;
}

void cluster_wait() {
  if (!fiber->arrived_at_cluster) fail("waits at the cluster's barrier without having arrived");
  while (cluster.phase == fiber->cluster_phase) yield();
  fiber->arrived_at_cluster = false;
}

unsigned cluster_rank() { return cluster.rank; }
unsigned cluster_size() { return unsigned(cluster.blocks.size()); }

void *in_block(void *shared, unsigned rank) {
  if (rank >= cluster.blocks.size()) fail("block " + std::to_string(rank) + " of the cluster does not exist");
  if (rank == cluster.rank) return shared;
  if (cluster.blocks[rank].live == 0) fail("reads the shared memory of a block that has left");
  return cluster.blocks[rank].shared.data() + (static_cast<char *>(shared) - shared_memory().start);
}

void meet(unsigned mask, const char *call, uint64_t value, uint64_t (&values)[32]) {
  const unsigned own = 1u << lane();
  if (!(mask & own)) fail(std::string(call) + " with a mask that lacks the caller");
  auto &meetings = block->meetings[(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) / 32];
  auto meeting = std::find_if(meetings.begin(), meetings.end(),
                              [&](const Meeting &m) { return m.mask == mask && m.arrived != mask; });
  if (meeting == meetings.end()) {
    meeting = meetings.insert(meetings.end(), Meeting{mask, 0, 0, call, {}});
    std::fill_n(meeting->values, 32, ~uint64_t(0));
  }
  if (meeting->call != call) fail("lanes of a warp meet in " + meeting->call + " and " + call);
  meeting->values[lane()] = value;
  meeting->arrived |= own;
  ++progress;
  while (meeting->arrived != mask) yield();
  std::memcpy(values, meeting->values, sizeof values);
  meeting->left |= own;
  if (meeting->left == mask) meetings.erase(meeting);
}

cudaError_t allow_shared(const void *kernel, size_t bytes) {
  if (bytes > ifr::cuda::MOST_SHARED) return failure = "more shared memory than a block can have", cudaErrorInvalidValue;
  allowed[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t run(const cudaLaunchConfig_t &config, const void *kernel, const std::function<void()> &thread) {
  failure.clear();
  body = &thread;
  blockDim = config.blockDim, gridDim = config.gridDim;
  unsigned size = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) size = config.attrs[i].val.clusterDim.x;
  // Of the 48 KiB that a GPU gives unasked, what the kernel declares has to be left: at most 16 here.
  if (config.dynamicSmemBytes > std::max<size_t>(32 << 10, allowed[kernel])) failure = "more shared memory than allowed";
  if (blockDim.x * blockDim.y * blockDim.z > 1024) failure = "more than 1024 threads in a block";
  if (size == 0 || size > 8 || gridDim.x % size != 0) failure = "a grid that is no multiple of its clusters' size";
  const Memory memory = shared_memory();
  cluster.blocks.resize(size);
  for (unsigned z = 0; z < gridDim.z; ++z)
    for (unsigned y = 0; y < gridDim.y; ++y)
      for (unsigned x = 0; x < gridDim.x && failure.empty(); x += size) {
        for (unsigned r = 0; r < size; ++r) prepare(cluster.blocks[r], {x + r, y, z}, (x / size + r) % 2 == 1);
        run_cluster(memory, config.dynamicSmemBytes, x / size % 2 == 1);
      }
  return failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emulation

cudaError_t cudaGetLastError() { return emulation::failure.empty() ? cudaSuccess : cudaErrorLaunchFailure; }
const char *cudaGetErrorString(cudaError_t) { return emulation::failure.c_str(); }
