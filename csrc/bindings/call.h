// The operators: checks, parameter structs and registration, on LibTorch's stable ABI.
// Schemas live in fastlstm/ops.py; outputs are passed in, but for those of calls for latency.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "array.h"
#include "cuda/plan.h"
#include "lstm.h"

namespace fastlstm {
namespace {

using Handle = AtenTensorHandle;
using OptionalHandle = std::optional<AtenTensorHandle>;
using HandleList = std::vector<AtenTensorHandle>;

Threads torch_threads() {
  return {int(torch::stable::get_num_threads()), [](i64 n, void (*body)(i64, i64, void*), void* context) {
            TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, 1, body, context));
          }};
}

Dtype dtype_of(const Array& t) {
  if (t.dtype == aoti_torch_dtype_float32()) return Dtype::f32;
  if (t.dtype == aoti_torch_dtype_float64()) return Dtype::f64;
  if (t.dtype == aoti_torch_dtype_bfloat16()) return Dtype::bf16;
  STD_TORCH_CHECK(t.dtype == aoti_torch_dtype_float16(),
                  "fastlstm: expected a float32, float64, bfloat16 or float16 tensor");
  return Dtype::f16;
}

// What both passes derive from their common inputs.
struct Call {
  Sizes sizes{};
  Dtype dtype;
  int32_t type, compute_type;
  bool packed_rows;
  i64 rows = 0;  // of packed input
  DirectionWeights weights[2] = {};
  std::vector<i64> row_offset, active, order, length;
  Ragged ragged{};

  Call(const Array& x, const std::vector<Array>& w, i64 directions, const Array& batch_sizes, const Array& lengths,
       i64 gates, bool peephole = false, bool layer_norm = false)
      : dtype(dtype_of(x)), type(x.dtype),
        compute_type(dtype == Dtype::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32()),
        packed_rows(bool(batch_sizes)) {
    STD_TORCH_CHECK(directions == 1 || directions == 2, "fastlstm: expected 1 or 2 directions, got ", directions);
    const i64 each = i64(w.size()) / directions, plain = each - peephole - 4 * layer_norm;
    STD_TORCH_CHECK(plain >= 2 && plain <= 5 && each * directions == i64(w.size()), "fastlstm: expected 2 to 5 weights",
                    peephole ? ", 1 of the peepholes" : "", layer_norm ? ", 4 of layer normalisation" : "",
                    " for each of ", directions, " directions, got ", w.size());
    STD_TORCH_CHECK(x.dim == 2 || (x.dim == 3 && !packed_rows), "fastlstm: expected ",
                    packed_rows ? "packed rows [N, I]" : "input [T, B, I], or [B, I] for one step", ", got ",
                    x.shape_text());
    STD_TORCH_CHECK(x.last_dense(), "fastlstm: the last dimension of the input must be dense");
    Sizes& s = sizes;
    s.D = directions;
    s.G = gates;
    s.bias = plain >= 4;
    s.projected = plain % 2 == 1;
    STD_TORCH_CHECK(gates > 1 || !s.projected, "fastlstm: an RNN has no projection");
    s.peephole = peephole;
    s.layer_norm = layer_norm;
    s.I = x.last();
    s.H = w[0].dim == 2 ? w[0].sizes[0] / s.G : 0;
    s.P = s.projected ? (w[size_t(plain) - 1].dim == 2 ? w[size_t(plain) - 1].sizes[0] : 0) : s.H;
    if (packed_rows) {
      rows = x.sizes[0];
      STD_TORCH_CHECK(batch_sizes.dim == 1, "fastlstm: expected batch_sizes [T], got ", batch_sizes.shape_text());
      batch_sizes.check_dtype("batch_sizes", aoti_torch_dtype_int64());
      s.T = batch_sizes.sizes[0];
      s.B = s.T ? static_cast<const i64*>(batch_sizes.data)[0] : 0;
    } else if (x.dim == 2) {  // one step: rows without an offset
      packed_rows = true;
      rows = s.B = x.sizes[0];
      s.T = 1;
    } else {
      s.T = x.sizes[0];
      s.B = x.sizes[1];
    }
    for (i64 d = 0; d < directions; ++d) {
      const Array* t = w.data() + d * each;
      for (i64 k = 0; k < each; ++k) {
        t[k].check_dtype("a weight", type);
        STD_TORCH_CHECK(t[k].contiguous(), "fastlstm: weights must be contiguous");
      }
      t[0].check_shape("weight_ih", {s.gate_units(), s.I});
      t[1].check_shape("weight_hh", {s.gate_units(), s.P});
      weights[d].w_ih = t[0].data;
      weights[d].w_hh = t[1].data;
      if (s.bias) {
        t[2].check_shape("bias_ih", {s.gate_units()});
        t[3].check_shape("bias_hh", {s.gate_units()});
        weights[d].b_ih = t[2].data;
        weights[d].b_hh = t[3].data;
      }
      if (s.projected) {
        t[plain - 1].check_shape("weight_hr", {s.P, s.H});
        weights[d].w_hr = t[plain - 1].data;
      }
      t += plain;
      if (peephole) {
        t->check_shape("weight_ch", {3 * s.H});
        weights[d].w_ch = t++->data;
      }
      if (layer_norm) {
        t[0].check_shape("ln_ih", {4 * s.H});
        t[1].check_shape("ln_hh", {4 * s.H});
        t[2].check_shape("ln_c", {s.H});
        t[3].check_shape("bias_ln_c", {s.H});
        weights[d].ln_ih = t[0].data;
        weights[d].ln_hh = t[1].data;
        weights[d].ln_c = t[2].data;
        weights[d].b_ln_c = t[3].data;
      }
    }
    if (batch_sizes) from_batch_sizes(batch_sizes);
    if (lengths) from_lengths(lengths);
  }

  void from_batch_sizes(const Array& batch_sizes) {
    STD_TORCH_CHECK(batch_sizes.contiguous(), "fastlstm: batch_sizes must be contiguous");
    const i64* n = static_cast<const i64*>(batch_sizes.data);
    row_offset.resize(size_t(sizes.T));
    length.resize(size_t(sizes.B));
    i64 total = 0;
    for (i64 t = 0; t < sizes.T; ++t) {
      STD_TORCH_CHECK(n[t] > 0 && (t == 0 || n[t] <= n[t - 1]),
                      "fastlstm: batch_sizes must be positive and never increase");
      row_offset[size_t(t)] = total;
      total += n[t];
    }
    STD_TORCH_CHECK(total == rows, "fastlstm: batch_sizes add up to ", total, " rows, the input has ", rows);
    i64 t = sizes.T;
    for (i64 slot = 0; slot < sizes.B; ++slot) {
      while (n[t - 1] <= slot) --t;
      length[size_t(slot)] = t;
    }
    ragged = {row_offset.data(), n, nullptr, length.data()};
  }

  void from_lengths(const Array& lengths) {
    STD_TORCH_CHECK(!packed_rows, "fastlstm: packed rows have their lengths in batch_sizes");
    lengths.check_dtype("lengths", aoti_torch_dtype_int64());
    lengths.check_shape("lengths", {sizes.B});
    STD_TORCH_CHECK(lengths.contiguous(), "fastlstm: lengths must be contiguous");
    const i64* n = static_cast<const i64*>(lengths.data);
    order.resize(size_t(sizes.B));
    std::iota(order.begin(), order.end(), i64(0));
    std::stable_sort(order.begin(), order.end(), [&](i64 a, i64 b) { return n[a] > n[b]; });
    active.assign(size_t(sizes.T), 0);
    for (i64 b : order) {
      STD_TORCH_CHECK(n[b] >= 0 && n[b] <= sizes.T, "fastlstm: expected lengths between 0 and ", sizes.T, ", got ",
                      n[b]);
      length.push_back(n[b]);
    }
    i64 slot = sizes.B;
    for (i64 t = 0; t < sizes.T; ++t) {
      while (slot > 0 && length[size_t(slot - 1)] <= t) --slot;
      active[size_t(t)] = slot;
    }
    ragged = {nullptr, active.data(), order.data(), length.data()};
  }

  // [T, B, D*n], or packed rows [N, D*n], each direction with n columns of its own; absent stays absent.
  Rows rows_of(const Array& t, const char* name, i64 n, int32_t expected) const {
    Rows result = shared_rows_of(t, name, sizes.D * n, expected);
    result.direction = n;
    return result;
  }
  // [T, B, n] or [N, n], the same for both directions.
  Rows shared_rows_of(const Array& t, const char* name, i64 n, int32_t expected) const {
    if (!t) return {};
    t.check_dtype(name, expected);
    packed_rows ? t.check_shape(name, {rows, n}) : t.check_shape(name, {sizes.T, sizes.B, n});
    STD_TORCH_CHECK(t.last_dense(), "fastlstm: the last dimension of ", name, " must be dense");
    return {t.data, 0, packed_rows ? 0 : t.strides[0], t.strides[packed_rows ? 0 : 1]};
  }
  // [D, T, B, 4H] or [D, N, 4H], contiguous: a direction walks through its own memory.
  Rows gates_of(const Array& t) const {
    if (!t) return {};
    const i64 n = 4 * sizes.H;
    t.check_dtype("gates", compute_type);
    packed_rows ? t.check_shape("gates", {sizes.D, rows, n}) : t.check_shape("gates", {sizes.D, sizes.T, sizes.B, n});
    STD_TORCH_CHECK(t.contiguous(), "fastlstm: gates must be contiguous");
    return {t.data, (packed_rows ? rows : sizes.T * sizes.B) * n, sizes.B * n, n};
  }
  // [D, B, n], or [B, n] with one direction
  States states_of(const Array& t, const char* name, i64 n, int32_t expected) const {
    if (!t) return {};
    t.check_dtype(name, expected);
    const bool flat = t.dim == 2 && sizes.D == 1;
    flat ? t.check_shape(name, {sizes.B, n}) : t.check_shape(name, {sizes.D, sizes.B, n});
    STD_TORCH_CHECK(t.last_dense(), "fastlstm: the last dimension of ", name, " must be dense");
    return {t.data, flat ? 0 : t.strides[0], t.strides[flat ? 0 : 1]};
  }
  CellOptions cell_of(const Array& h_mask, double zoneout_c, double zoneout_h, const Array& seed) const {
    STD_TORCH_CHECK(zoneout_c >= 0 && zoneout_c < 1 && zoneout_h >= 0 && zoneout_h < 1,
                    "fastlstm: expected probabilities of zoneout in [0, 1), got ", zoneout_c, " and ", zoneout_h);
    CellOptions cell{};
    cell.h_mask = states_of(h_mask, "h_mask", sizes.P, compute_type);
    cell.zoneout_c = zoneout_c;
    cell.zoneout_h = zoneout_h;
    if (seed) {
      seed.check_dtype("seed", aoti_torch_dtype_int64());
      seed.check_shape("seed", {1});
      cell.random = true;
      std::memcpy(&cell.seed, seed.data, sizeof cell.seed);
    }
    return cell;
  }
  // Sets the reset mask [T, B] of forward or backward parameters.
  template <class Params>
  void set_reset(const Array& reset, Params& p) const {
    if (!reset) return;
    STD_TORCH_CHECK(!packed_rows, "fastlstm: reset needs padded input");
    reset.check_dtype("reset", aoti_torch_dtype_bool());
    reset.check_shape("reset", {sizes.T, sizes.B});
    p.reset = static_cast<const bool*>(reset.data);
    p.reset_step = reset.strides[0];
    p.reset_batch = reset.strides[1];
  }
};

// Weights in kernel order for one call: from the caller's buffer while it holds these very weights, else packed
// anew. An edit through `.data` leaves no trace but the bytes, so a hash of them tells.
//
// Threads may share a buffer. Its header counts the calls that read it; it is repacked by one call that finds
// nobody reading. A call that finds it busy with other weights packs for itself.
class PackedWeights {
 public:
  static constexpr i64 kHeaderBytes = 64;

  // In which orders: forward, backward, or, for a backward pass that computes the gates again, both.
  enum Kind { kForward, kBackward, kBoth };

  PackedWeights(const Call& call, Kind kind, const Array& cache) : kind_(kind) {
    const Kernels& kernels = cpu_kernels();
    const bool is_double = call.dtype == Dtype::f64;
    backward_bytes_ = kind == kForward ? 0 : round_up(kernels.backward_bytes(call.sizes, is_double));
    const size_t bytes =
        backward_bytes_ + (kind == kBackward ? 0 : round_up(kernels.forward_bytes(call.sizes, is_double)));
    const bool fits = cache && cache.dtype == aoti_torch_dtype_uint8() && cache.dim == 1 &&
                      cache.sizes[0] >= i64(bytes) + kHeaderBytes && cache.contiguous();
    if (fits && share(call, static_cast<char*>(cache.data))) return;
    own_.reset(static_cast<char*>(std::aligned_alloc(64, bytes)));
    STD_TORCH_CHECK(own_ || !bytes, "fastlstm: out of memory for packed weights");
    data_ = own_.get();
    pack(call);
  }
  ~PackedWeights() {
    if (header_) header_->readers.fetch_sub(1, std::memory_order_release);
  }
  PackedWeights(const PackedWeights&) = delete;

  const void* backward() const { return data_; }
  const void* forward() const { return data_ + backward_bytes_; }
  static size_t round_up(size_t bytes) { return (bytes + 63) / 64 * 64; }

 private:
  struct Header {
    std::atomic<uint64_t> hash;    // of what was packed and how; 0: nothing yet
    std::atomic<int32_t> readers;  // calls in flight; -1 while one of them packs
  };
  static_assert(sizeof(Header) <= kHeaderBytes);

  // Whether the shared buffer now holds these weights and will keep them until this object goes.
  bool share(const Call& call, char* base) {
    auto* header = reinterpret_cast<Header*>(base);
    const uint64_t wanted = hash_weights(call);
    int32_t readers = header->readers.load(std::memory_order_acquire);
    while (readers >= 0 && header->hash.load(std::memory_order_acquire) == wanted)
      if (header->readers.compare_exchange_weak(readers, readers + 1, std::memory_order_acq_rel)) {
        // From here on nobody repacks; it may have happened just before.
        if (header->hash.load(std::memory_order_acquire) == wanted) {
          header_ = header;
          data_ = base + kHeaderBytes;
          return true;
        }
        header->readers.fetch_sub(1, std::memory_order_release);
        return false;
      }
    readers = 0;
    if (!header->readers.compare_exchange_strong(readers, -1, std::memory_order_acq_rel)) return false;
    header_ = header;
    data_ = base + kHeaderBytes;
    header->hash.store(0, std::memory_order_release);
    pack(call);
    // Weights that changed while they were packed may be a mixture: good for this call at most.
    if (hash_weights(call) == wanted) header->hash.store(wanted, std::memory_order_release);
    header->readers.store(1, std::memory_order_release);
    return true;
  }

  void pack(const Call& call) const {
    const Kernels& kernels = cpu_kernels();
    if (kind_ != kForward) kernels.pack_backward(call.sizes, call.dtype, call.weights, data_);
    if (kind_ != kBackward) kernels.pack_forward(call.sizes, call.dtype, call.weights, data_ + backward_bytes_);
  }

  uint64_t hash_weights(const Call& call) const {
    const Kernels& kernels = cpu_kernels();
    const Sizes& s = call.sizes;
    const i64 tag[] = {s.I, s.H, s.P, s.D, s.G, s.bias, s.projected, s.layer_norm, i64(call.dtype), kind_};
    uint64_t h = kernels.hash(tag, sizeof tag, 1);
    const size_t e = call.dtype == Dtype::f64 ? 8 : call.dtype == Dtype::f32 ? 4 : 2;
    for (i64 d = 0; d < s.D; ++d) {
      const DirectionWeights& w = call.weights[d];
      h = hash_large(w.w_ih, size_t(s.gate_units() * s.I) * e, h);
      h = hash_large(w.w_hh, size_t(s.gate_units() * s.P) * e, h);
      if (kind_ != kBackward && s.bias) {
        h = kernels.hash(w.b_ih, size_t(s.gate_units()) * e, h);
        h = kernels.hash(w.b_hh, size_t(s.gate_units()) * e, h);
      }
      if (s.projected) h = hash_large(w.w_hr, size_t(s.P * s.H) * e, h);
    }
    return h | 1;  // never the zero of a fresh buffer
  }
  // Blocks of a large matrix are hashed side by side; their hashes are then hashed.
  static uint64_t hash_large(const void* data, size_t bytes, uint64_t seed) {
    constexpr size_t kBlock = 256 << 10;
    const Kernels& kernels = cpu_kernels();
    if (bytes <= kBlock) return kernels.hash(data, bytes, seed);
    std::vector<uint64_t> hashes((bytes + kBlock - 1) / kBlock);
    torch::stable::parallel_for(0, i64(hashes.size()), 1, [&](i64 begin, i64 end) {
      for (i64 k = begin; k < end; ++k)
        hashes[size_t(k)] = kernels.hash(static_cast<const char*>(data) + size_t(k) * kBlock,
                                         std::min(kBlock, bytes - size_t(k) * kBlock), seed);
    });
    return kernels.hash(hashes.data(), hashes.size() * sizeof(uint64_t), seed);
  }

  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  const Kind kind_;
  size_t backward_bytes_;  // what lies before the forward order
  std::unique_ptr<char, Free> own_;
  Header* header_ = nullptr;  // of the shared buffer in use
  char* data_ = nullptr;
};

// dweights: none, or for each direction w_ih, w_hh, (b), (w_hr), (w_ch), (ln_ih, ln_hh, ln_c, b_ln_c)
void set_weight_gradients(const Call& call, const std::vector<Array>& dweights, BackwardParams& p) {
  const Sizes& s = call.sizes;
  const i64 each = 2 + s.bias + s.projected + s.peephole + 4 * s.layer_norm;
  STD_TORCH_CHECK(dweights.empty() || i64(dweights.size()) == each * s.D, "fastlstm: expected ", each,
                  " weight gradients for each direction, got ", dweights.size());
  for (i64 d = 0; d < s.D && !dweights.empty(); ++d) {
    const Array* t = dweights.data() + d * each;
    for (i64 k = 0; k < each; ++k) {
      t[k].check_dtype("a weight gradient", call.compute_type);
      STD_TORCH_CHECK(t[k].contiguous(), "fastlstm: weight gradients must be contiguous");
    }
    t[0].check_shape("gradient of weight_ih", {s.gate_units(), s.I});
    t[1].check_shape("gradient of weight_hh", {s.gate_units(), s.P});
    BackwardParams::Gradients& dw = p.dw[d];
    dw.w_ih = t[0].data;
    dw.w_hh = t[1].data;
    t += 2;
    const auto take = [&](void*& data, bool there, const char* name, std::initializer_list<i64> shape) {
      if (!there) return;
      t->check_shape(name, shape);
      data = t++->data;
    };
    take(dw.b, s.bias, "gradient of the bias", {s.gate_units()});
    take(dw.w_hr, s.projected, "gradient of weight_hr", {s.P, s.H});
    take(dw.w_ch, s.peephole, "gradient of weight_ch", {3 * s.H});
    take(dw.ln_ih, s.layer_norm, "gradient of ln_ih", {4 * s.H});
    take(dw.ln_hh, s.layer_norm, "gradient of ln_hh", {4 * s.H});
    take(dw.ln_c, s.layer_norm, "gradient of ln_c", {s.H});
    take(dw.b_ln_c, s.layer_norm, "gradient of bias_ln_c", {s.H});
  }
}

// A pass of one layer: everything checked by its constructor, then run on some threads.
struct Forward {
  Call call;
  ForwardParams p{};

  Forward(const Array& x, const std::vector<Array>& weights, i64 directions, const Array& h0, const Array& c0,
          const Array& batch_sizes, const Array& lengths, const Array& reset, const Array& y, const Array& h_n,
          const Array& c_n, const Array& c_all, const Array& gates, bool peephole, bool layer_norm, const Array& h_mask,
          double zoneout_c, double zoneout_h, const Array& seed)
      : Forward(Call(x, weights, directions, batch_sizes, lengths, 4, peephole, layer_norm), x, h0, c0, y, h_n, c_n) {
    STD_TORCH_CHECK(!layer_norm || !gates, "fastlstm: layer normalisation keeps no gates");
    call.set_reset(reset, p);
    p.c_all = call.rows_of(c_all, "c_all", call.sizes.H, call.compute_type);
    p.gates = call.gates_of(gates);
    p.cell = call.cell_of(h_mask, zoneout_c, zoneout_h, seed);
  }
  // A plain LSTM.
  Forward(Call&& call_, const Array& x, const Array& h0, const Array& c0, const Array& y, const Array& h_n,
          const Array& c_n)
      : Forward(std::move(call_), x, h0, y, h_n) {
    p.c0 = call.states_of(c0, "c0", call.sizes.H, call.type);
    p.c_n = call.states_of(c_n, "c_n", call.sizes.H, call.type);
  }
  Forward(const Array& x, const std::vector<Array>& weights, i64 directions, const Array& h0, const Array& batch_sizes,
          const Array& lengths, const Array& reset, bool relu, const Array& y, const Array& h_n)
      : Forward(Call(x, weights, directions, batch_sizes, lengths, 1), x, h0, y, h_n) {
    call.set_reset(reset, p);
    p.cell.relu = relu;
  }
  Forward(const Forward&) = delete;

  PackedWeights::Kind kind() const { return PackedWeights::kForward; }
  void run(const PackedWeights& packed, Threads threads) {
    p.packed = packed.forward();
    p.threads = threads;
    cpu_kernels().forward(p);
  }
  void run(const Array& cache) { run(PackedWeights(call, kind(), cache), torch_threads()); }

 private:
  Forward(Call&& call_, const Array& x, const Array& h0, const Array& y, const Array& h_n) : call(std::move(call_)) {
    const Sizes& s = call.sizes;
    p.sizes = s;
    p.dtype = call.dtype;
    p.ragged = call.ragged;
    p.x = call.shared_rows_of(x, "input", s.I, call.type);
    p.y = call.rows_of(y, "y", s.P, call.type);
    p.h0 = call.states_of(h0, "h0", s.P, call.type);
    p.h_n = call.states_of(h_n, "h_n", s.P, call.type);
    p.weights = call.weights;
  }
};

struct Backward {
  Call call;
  BackwardParams p{};

  Backward(const Array& x, const std::vector<Array>& weights, i64 directions, const Array& h0, const Array& c0,
           const Array& batch_sizes, const Array& lengths, const Array& reset, const Array& y, const Array& c_all,
           const Array& gates, const Array& dy, const Array& dh_n, const Array& dc_n, const Array& dc_all,
           const Array& dx, const Array& dh0, const Array& dc0, const std::vector<Array>& dweights, bool peephole,
           bool layer_norm, const Array& h_mask, double zoneout_c, double zoneout_h, const Array& seed)
      : Backward(Call(x, weights, directions, batch_sizes, lengths, 4, peephole, layer_norm), x, h0, reset, y, dy, dh_n,
                 dx, dh0, dweights) {
    STD_TORCH_CHECK(!layer_norm || !gates, "fastlstm: layer normalisation keeps no gates");
    const i64 H = call.sizes.H;
    const int32_t grad = call.compute_type;
    p.c_all = call.rows_of(c_all, "c_all", H, grad);
    p.gates = call.gates_of(gates);
    p.c0 = call.states_of(c0, "c0", H, call.type);
    p.dc_all = call.rows_of(dc_all, "dc_all", H, grad);
    p.dc_n = call.states_of(dc_n, "dc_n", H, grad);
    p.dc0 = call.states_of(dc0, "dc0", H, grad);
    p.cell = call.cell_of(h_mask, zoneout_c, zoneout_h, seed);
  }
  Backward(const Array& x, const std::vector<Array>& weights, i64 directions, const Array& h0, const Array& batch_sizes,
           const Array& lengths, const Array& reset, bool relu, const Array& y, const Array& dy, const Array& dh_n,
           const Array& dx, const Array& dh0, const std::vector<Array>& dweights)
      : Backward(Call(x, weights, directions, batch_sizes, lengths, 1), x, h0, reset, y, dy, dh_n, dx, dh0, dweights) {
    p.cell.relu = relu;
  }
  Backward(const Backward&) = delete;

  // An RNN has no gates to compute again.
  PackedWeights::Kind kind() const {
    return p.gates.data || call.sizes.G == 1 ? PackedWeights::kBackward : PackedWeights::kBoth;
  }
  void run(const PackedWeights& packed, Threads threads) {
    p.packed = packed.backward();
    if (kind() == PackedWeights::kBoth) p.packed_forward = packed.forward();
    p.threads = threads;
    cpu_kernels().backward(p);
  }

 private:
  Backward(Call&& call_, const Array& x, const Array& h0, const Array& reset, const Array& y, const Array& dy,
           const Array& dh_n, const Array& dx, const Array& dh0, const std::vector<Array>& dweights)
      : call(std::move(call_)) {
    const Sizes& s = call.sizes;
    const int32_t grad = call.compute_type;
    p.sizes = s;
    p.dtype = call.dtype;
    p.ragged = call.ragged;
    p.x = call.shared_rows_of(x, "input", s.I, call.type);
    p.y = call.rows_of(y, "y", s.P, call.type);
    p.h0 = call.states_of(h0, "h0", s.P, call.type);
    call.set_reset(reset, p);
    p.dy = call.rows_of(dy, "dy", s.P, grad);
    p.dh_n = call.states_of(dh_n, "dh_n", s.P, grad);
    p.dx = call.shared_rows_of(dx, "dx", s.I, grad);
    p.dh0 = call.states_of(dh0, "dh0", s.P, grad);
    p.weights = call.weights;
    set_weight_gradients(call, dweights, p);
  }
};

// The share of one member in an argument: of tensors, what lies at its place of the first dimension.
template <class T>
T member(T option, i64, i64) {
  return option;
}
Array member(const Array& t, i64 k, i64 members) {
  if (!t) return Array();
  STD_TORCH_CHECK(t.dim > 0 && t.sizes[0] == members, "fastlstm: expected ", members, " members, got a tensor ",
                  t.shape_text());
  return t.at(k);
}
std::vector<Array> member(const std::vector<Array>& tensors, i64 k, i64 members) {
  std::vector<Array> found;
  found.reserve(tensors.size());
  for (const Array& t : tensors) found.push_back(member(t, k, members));
  return found;
}

// A pass of each member. Members that are many take a thread each; few share all threads, one after the other.
template <class Pass, class... Arguments>
void run_members(i64 members, const Arguments&... arguments) {
  STD_TORCH_CHECK(members > 0, "fastlstm: expected a positive number of members, got ", members);
  std::deque<Pass> passes;
  for (i64 k = 0; k < members; ++k) passes.emplace_back(member(arguments, k, members)...);
  Pass& first = passes.front();
  const auto same_weights = [&](const Pass& pass) {
    return !std::memcmp(pass.call.weights, first.call.weights, sizeof first.call.weights);
  };
  std::optional<PackedWeights> shared;
  if (std::all_of(passes.begin(), passes.end(), same_weights)) shared.emplace(first.call, first.kind(), Array());
  const auto run = [&](i64 k, Threads threads) {
    Pass& pass = passes[size_t(k)];
    if (shared) {
      pass.run(*shared, threads);
    } else {
      pass.run(PackedWeights(pass.call, pass.kind(), Array()), threads);
    }
  };
  const Threads threads = torch_threads();
  if (2 * members > threads.count) {
    torch::stable::parallel_for(0, members, 1, [&](i64 begin, i64 end) {
      for (i64 k = begin; k < end; ++k) run(k, {1, nullptr});
    });
  } else {
    for (i64 k = 0; k < members; ++k) run(k, threads);
  }
}

template <class Pass, class... Arguments>
void run_pass(i64 members, const Array& cache, const Arguments&... arguments) {
  if (members) return run_members<Pass>(members, arguments...);
  Pass pass(arguments...);
  pass.run(PackedWeights(pass.call, pass.kind(), cache), torch_threads());
}

void lstm_fwd_cpu(Handle x_, const HandleList& weights_, i64 directions, OptionalHandle h0_, OptionalHandle c0_,
                  OptionalHandle batch_sizes_, OptionalHandle lengths_, OptionalHandle reset_, Handle y_, Handle h_n_,
                  Handle c_n_, OptionalHandle c_all_, OptionalHandle gates_, OptionalHandle cache_, bool peephole,
                  bool layer_norm, OptionalHandle h_mask_, double zoneout_c, double zoneout_h, OptionalHandle seed_,
                  i64 members) {
  const std::vector<Array> weights = to_arrays(weights_);
  const Array x(x_), h0(h0_), c0(c0_), batch_sizes(batch_sizes_), lengths(lengths_), reset(reset_), y(y_), h_n(h_n_),
      c_n(c_n_), c_all(c_all_), gates(gates_), cache(cache_), h_mask(h_mask_), seed(seed_);
  run_pass<Forward>(members, cache, x, weights, directions, h0, c0, batch_sizes, lengths, reset, y, h_n, c_n, c_all,
                    gates, peephole, layer_norm, h_mask, zoneout_c, zoneout_h, seed);
}

// Plain calls for latency. An argument that a call does not have takes its time too, and a tensor that Python makes and
// passes in takes several times that of one made here.
std::tuple<Output, Output, Output> lstm_infer_cpu(Handle x_, const HandleList& weights_, i64 directions,
                                                  OptionalHandle h0_, OptionalHandle c0_, OptionalHandle cache_) {
  const std::vector<Array> weights = to_arrays(weights_);
  const Array x(x_), h0(h0_), c0(c0_), cache(cache_);
  Call call(x, weights, directions, Array(), Array(), 4);
  const Sizes s = call.sizes;
  STD_TORCH_CHECK(x.dim == 3 && s.T > 0, "fastlstm: expected input [T, B, I] with T > 0, got ", x.shape_text());
  Array y = Array::empty({s.T, s.B, s.D * s.P}, x.dtype), h_n = Array::empty({s.D, s.B, s.P}, x.dtype),
        c_n = Array::empty({s.D, s.B, s.H}, x.dtype);
  Forward(std::move(call), x, h0, c0, y, h_n, c_n).run(cache);
  return {y.release(), h_n.release(), c_n.release()};
}

// One step of a cell: its output is its hidden state.
std::tuple<Output, Output> lstm_cell_infer_cpu(Handle x_, const HandleList& weights_, OptionalHandle h0_,
                                               OptionalHandle c0_, OptionalHandle cache_) {
  const std::vector<Array> weights = to_arrays(weights_);
  const Array x(x_), h0(h0_), c0(c0_), cache(cache_);
  STD_TORCH_CHECK(x.dim == 2, "fastlstm: expected input [B, I], got ", x.shape_text());
  Call call(x, weights, 1, Array(), Array(), 4);
  const Sizes s = call.sizes;
  Array h = Array::empty({s.B, s.P}, x.dtype), c = Array::empty({s.B, s.H}, x.dtype);
  Forward(std::move(call), x, h0, c0, h, h, c).run(cache);
  return {h.release(), c.release()};
}

void lstm_bwd_cpu(Handle x_, const HandleList& weights_, i64 directions, OptionalHandle h0_, OptionalHandle c0_,
                  OptionalHandle batch_sizes_, OptionalHandle lengths_, OptionalHandle reset_, Handle y_, Handle c_all_,
                  OptionalHandle gates_, OptionalHandle dy_, OptionalHandle dh_n_, OptionalHandle dc_n_,
                  OptionalHandle dc_all_, OptionalHandle dx_, OptionalHandle dh0_, OptionalHandle dc0_,
                  const HandleList& dweights_, OptionalHandle cache_, bool peephole, bool layer_norm,
                  OptionalHandle h_mask_, double zoneout_c, double zoneout_h, OptionalHandle seed_, i64 members) {
  const std::vector<Array> weights = to_arrays(weights_), dweights = to_arrays(dweights_);
  const Array x(x_), h0(h0_), c0(c0_), batch_sizes(batch_sizes_), lengths(lengths_), reset(reset_), y(y_),
      c_all(c_all_), gates(gates_), dy(dy_), dh_n(dh_n_), dc_n(dc_n_), dc_all(dc_all_), dx(dx_), dh0(dh0_), dc0(dc0_),
      cache(cache_), h_mask(h_mask_), seed(seed_);
  run_pass<Backward>(members, cache, x, weights, directions, h0, c0, batch_sizes, lengths, reset, y, c_all, gates, dy,
                     dh_n, dc_n, dc_all, dx, dh0, dc0, dweights, peephole, layer_norm, h_mask, zoneout_c, zoneout_h,
                     seed);
}

void rnn_fwd_cpu(Handle x_, const HandleList& weights_, i64 directions, OptionalHandle h0_, OptionalHandle batch_sizes_,
                 OptionalHandle lengths_, OptionalHandle reset_, bool relu, Handle y_, Handle h_n_,
                 OptionalHandle cache_, i64 members) {
  const std::vector<Array> weights = to_arrays(weights_);
  const Array x(x_), h0(h0_), batch_sizes(batch_sizes_), lengths(lengths_), reset(reset_), y(y_), h_n(h_n_),
      cache(cache_);
  run_pass<Forward>(members, cache, x, weights, directions, h0, batch_sizes, lengths, reset, relu, y, h_n);
}

void rnn_bwd_cpu(Handle x_, const HandleList& weights_, i64 directions, OptionalHandle h0_, OptionalHandle batch_sizes_,
                 OptionalHandle lengths_, OptionalHandle reset_, bool relu, Handle y_, OptionalHandle dy_,
                 OptionalHandle dh_n_, OptionalHandle dx_, OptionalHandle dh0_, const HandleList& dweights_,
                 OptionalHandle cache_, i64 members) {
  const std::vector<Array> weights = to_arrays(weights_), dweights = to_arrays(dweights_);
  const Array x(x_), h0(h0_), batch_sizes(batch_sizes_), lengths(lengths_), reset(reset_), y(y_), dy(dy_), dh_n(dh_n_),
      dx(dx_), dh0(dh0_), cache(cache_);
  run_pass<Backward>(members, cache, x, weights, directions, h0, batch_sizes, lengths, reset, relu, y, dy, dh_n, dx,
                     dh0, dweights);
}

Sizes layer_sizes(i64 input, i64 hidden, i64 projected, i64 directions) {
  Sizes s{};
  s.I = input;
  s.H = hidden;
  s.P = projected ? projected : hidden;
  s.D = directions;
  s.G = 4;
  s.projected = projected > 0;
  return s;
}

i64 cpu_cache_bytes(i64 input, i64 hidden, i64 projected, i64 directions, bool is_double) {
  const Kernels& kernels = cpu_kernels();
  const Sizes s = layer_sizes(input, hidden, projected, directions);
  const size_t bytes = std::max(kernels.forward_bytes(s, is_double), kernels.backward_bytes(s, is_double));
  return PackedWeights::kHeaderBytes + i64(PackedWeights::round_up(bytes));
}

std::string cpu_isa() { return cpu_kernels().name; }

std::string cpu_plan(i64 T, i64 B, i64 input, i64 hidden, i64 projected, i64 directions, i64 threads) {
  Sizes s = layer_sizes(input, hidden, projected, directions);
  s.T = T;
  s.B = B;
  char text[256];
  cpu_kernels().describe(s, int(threads), text, sizeof text);
  return text;
}

// device: arch, multiprocessors, bytes of shared memory of a block, blocks of a cluster; wish: regime, blocks, batch.
cuda::Plan planned(i64 kind, bool backward, i64 B, i64 hidden, i64 directions, const std::vector<i64>& device,
                   const std::vector<i64>& wish, const char** problem) {
  STD_TORCH_CHECK(kind >= 0 && kind < 4 && device.size() == 4 && wish.size() == 3 && hidden > 0 && hidden < 1 << 20,
                  "fastlstm: not the arguments of a plan");
  return cuda::plan_of({cuda::Kind(kind), backward, int(hidden), int(directions), B},
                       {int(device[0]), int(device[1]), int(device[2]), int(device[3])},
                       {int(wish[0]), int(wish[1]), int(wish[2])}, problem);
}

std::vector<i64> cuda_plan(i64 kind, bool backward, i64 B, i64 hidden, i64 directions, const std::vector<i64>& device,
                           const std::vector<i64>& wish) {
  const char* problem;
  const cuda::Plan p = planned(kind, backward, B, hidden, directions, device, wish, &problem);
  if (problem) return {};
  return {i64(p.regime), p.batch,        p.blocks, p.tiles,          p.parts,     p.resident,
          i64(p.rest),   p.shared_bytes, p.groups, p.exchange_words, p.rest_words};
}

std::string cuda_obstacle(i64 kind, bool backward, i64 B, i64 hidden, i64 directions, const std::vector<i64>& device,
                          const std::vector<i64>& wish) {
  const char* problem;
  planned(kind, backward, B, hidden, directions, device, wish, &problem);
  return problem ? problem : "";
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlstm, CPU, m) {
  m.impl("lstm_fwd_cpu", TORCH_BOX(&lstm_fwd_cpu));
  m.impl("lstm_bwd_cpu", TORCH_BOX(&lstm_bwd_cpu));
  m.impl("lstm_infer_cpu", TORCH_BOX(&lstm_infer_cpu));
  m.impl("lstm_cell_infer_cpu", TORCH_BOX(&lstm_cell_infer_cpu));
  m.impl("rnn_fwd_cpu", TORCH_BOX(&rnn_fwd_cpu));
  m.impl("rnn_bwd_cpu", TORCH_BOX(&rnn_bwd_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(fastlstm, CompositeExplicitAutograd, m) {
  m.impl("cpu_cache_bytes", TORCH_BOX(&cpu_cache_bytes));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_plan", TORCH_BOX(&cpu_plan));
  m.impl("cuda_plan", TORCH_BOX(&cuda_plan));
  m.impl("cuda_obstacle", TORCH_BOX(&cuda_obstacle));
}

}  // namespace fastlstm
