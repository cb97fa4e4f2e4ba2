// Parts of a CUDA graph that a replay runs only while samples of a solve still run. The device decides, at a conditional
// node; the host is not asked.
#include "common.cuh"

namespace ifr::cuda {

#if defined(CUDART_VERSION) && CUDART_VERSION >= 13000  // before, some of these functions had other parameters

namespace {

constexpr int OLDEST_DRIVER = 12040;  // that knows conditional nodes
constexpr int CONDITION_THREADS = 256;

__global__ void __launch_bounds__(CONDITION_THREADS)
    set_condition(cudaGraphConditionalHandle condition, const int64_t *status, int64_t n, int64_t least, int64_t most) {
  int64_t running = 0;
  for (int64_t first = 0; first < n; first += CONDITION_THREADS) {
    const int64_t i = first + threadIdx.x;
    running += __syncthreads_count(i < n && status[i] == MAX_ITER);
  }
  if (threadIdx.x == 0) cudaGraphSetConditional(condition, running >= least && running <= most);
}

// What a stream is recording: the graph, and the nodes that the next one will depend on.
struct Recorded {
  cudaGraph_t graph;
  const cudaGraphNode_t *nodes;
  const cudaGraphEdgeData *edges;
  size_t count;

  explicit Recorded(Stream stream) {
    cudaStreamCaptureStatus status;
    check(cudaStreamGetCaptureInfo(stream, &status, nullptr, &graph, &nodes, &edges, &count), "begin_part");
    if (status != cudaStreamCaptureStatusActive) throw std::runtime_error("begin_part: the stream records no graph");
  }
};

}  // namespace

bool has_parts() {
  int driver = 0;
  return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= OLDEST_DRIVER;
}

void begin_part(const int64_t *status, int64_t n, int64_t least, int64_t most, Stream outer, Stream inner) {
  cudaGraphNodeParams part{};
  part.type = cudaGraphNodeTypeConditional;
  part.conditional.type = cudaGraphCondTypeIf;
  part.conditional.size = 1;
  check(cudaGraphConditionalHandleCreate(&part.conditional.handle, Recorded(outer).graph), "begin_part");
  launch("begin_part", set_condition, 1, CONDITION_THREADS, 0, 1, outer, part.conditional.handle, status, n,
         least, most);
  const Recorded before(outer);
  cudaGraphNode_t node;
  check(cudaGraphAddNode(&node, before.graph, before.nodes, before.edges, before.count, &part), "begin_part");
  check(cudaStreamUpdateCaptureDependencies(outer, &node, nullptr, 1, cudaStreamSetCaptureDependencies), "begin_part");
  check(cudaStreamBeginCaptureToGraph(inner, part.conditional.phGraph_out[0], nullptr, nullptr, 0,
                                      cudaStreamCaptureModeThreadLocal),
        "begin_part");
}

void end_part(Stream inner) {
  cudaGraph_t graph;
  check(cudaStreamEndCapture(inner, &graph), "end_part");
}

#else

bool has_parts() { return false; }
void begin_part(const int64_t *, int64_t, int64_t, int64_t, Stream, Stream) {
  throw std::runtime_error("begin_part needs CUDA 13");
}
void end_part(Stream) { throw std::runtime_error("end_part needs CUDA 13"); }

#endif

}  // namespace ifr::cuda
