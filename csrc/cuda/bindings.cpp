// The recurrence of a layer on a GPU, as two operators; the Python side computes the products before and after it. The
// host's compiler compiles this file: it calls kernels and has none. With FASTLSTM_EMULATE the operators take CPU
// tensors.
#include <algorithm>
#include <initializer_list>
#include <string>
#include <vector>

#include "bindings/array.h"
#include "launch.h"
#include "out_of_memory.h"

namespace fastlstm::cuda {
namespace {

using Handle = AtenTensorHandle;
using OptionalHandle = std::optional<AtenTensorHandle>;
using HandleList = std::vector<AtenTensorHandle>;

Kind kind_of(const Array& t, bool tf32) {
  if (t.dtype == aoti_torch_dtype_bfloat16()) return Kind::bf16;
  if (t.dtype == aoti_torch_dtype_float16()) return Kind::f16;
  FASTLSTM_CHECK(t.dtype == aoti_torch_dtype_float32(),
                 "fastlstm: expected a float32, bfloat16 or float16 tensor for the cuda kernels, got ",
                 dtype_text(t.dtype));
  return tf32 ? Kind::tf32 : Kind::exact;
}

// The data of a tensor, checked: dtype, shape, contiguous, aligned. Null if it is absent.
void* dense(const Array& t, const char* name, int32_t dtype, std::initializer_list<i64> shape, uintptr_t align = 1) {
  if (!t) return nullptr;
  t.check_dtype(name, dtype);
  t.check_shape(name, shape);
  FASTLSTM_CHECK(t.contiguous(), "fastlstm: ", name, " must be contiguous");
  FASTLSTM_CHECK(reinterpret_cast<uintptr_t>(t.data) % align == 0, "fastlstm: ", name, " must be aligned to ", align,
                 " bytes");
  return t.data;
}

// Work space of `count` 32-bit words.
int32_t* words(const Array& t, const char* name, i64 count) {
  if (count == 0) return nullptr;
  FASTLSTM_CHECK(t && t.dim == 1 && t.sizes[0] == count, "fastlstm: expected ", name, " of ", count, " int32");
  return static_cast<int32_t*>(dense(t, name, aoti_torch_dtype_int32(), {count}, 16));
}

// The most steps, and the most sequences: numbers a little larger than either are counted in 32 bits.
constexpr i64 kMost = (i64(1) << 31) - 64;

// What both passes have in common. The constructor checks it, fills the arguments of a kernel, and says how to launch.
struct Call {
  Kind kind;
  int32_t type;  // torch's number of the dtype of y
  i64 rows, H, D, T, B;
  bool packed;
  Launch launch;

  Call(const Array& y, const std::vector<Array>& w_hh, const Array& offsets, const Array& lengths, const Array& reset,
       i64 T, i64 B, const std::vector<i64>& plan, bool tf32, bool backward, const Array& exchange,
       const Array& arrived, const Array& rest, i64 device, i64 stream, Layer* p)
      : kind(kind_of(y, tf32)), type(y.dtype), D(i64(w_hh.size())), T(T), B(B), packed(bool(offsets)) {
    read_sizes(y, p);
    for (i64 d = 0; d < D; ++d) p->w_hh[d] = dense(w_hh[size_t(d)], "weight_hh", type, {4 * H, H});
    p->offsets = static_cast<const int64_t*>(dense(offsets, "offsets", aoti_torch_dtype_int64(), {T}));
    p->lengths = static_cast<const int64_t*>(dense(lengths, "lengths", aoti_torch_dtype_int64(), {B}));
    p->reset = static_cast<const uint8_t*>(dense(reset, "reset", aoti_torch_dtype_uint8(), {T, B}));
    read_plan(plan, backward, p);
    read_work_space(exchange, arrived, rest, backward, p);
    launch.device = int(device);
    launch.stream = stream;
    launch.kernel = find_kernel(p->plan.regime, kind, p->plan.batch, p->plan.resident);
    FASTLSTM_CHECK(launch.kernel, "fastlstm: this build has no kernel for the plan");
  }
  void* states(const Array& t, const char* name) const { return dense(t, name, type, {D, B, H}); }
  void* steps(const Array& t, const char* name, int32_t dtype) const { return dense(t, name, dtype, {rows, D * H}); }
  // [T, B, D*H], or packed rows [N, D*H], with any strides before the last dimension. Null if it is absent.
  const void* strided(const Array& t, const char* name, int64_t* step, int64_t* sequence) const {
    if (!t) return nullptr;
    t.check_dtype(name, type);
    packed ? t.check_shape(name, {rows, D * H}) : t.check_shape(name, {T, B, D * H});
    FASTLSTM_CHECK(t.last_dense(), "fastlstm: the last dimension of ", name, " must be dense");
    *step = t.strides[0];
    *sequence = t.strides[packed ? 0 : 1];
    return t.data;
  }

 private:
  void read_sizes(const Array& y, Layer* p) {
    FASTLSTM_CHECK(D == 1 || D == 2, "fastlstm: expected W_hh of 1 or 2 directions, got ", D);
    FASTLSTM_CHECK(y.dim == 2, "fastlstm: expected y [rows, D*H], got ", y.shape_text());
    FASTLSTM_CHECK(T > 0 && B > 0 && T < kMost && B < kMost, "fastlstm: expected 1 to ", kMost - 1,
                   " steps and sequences, got ", T, " and ", B);
    rows = y.sizes[0];
    H = y.last() / D;
    FASTLSTM_CHECK(H > 0 && H < (1 << 20) && (packed || rows == T * B), "fastlstm: y ", y.shape_text(),
                   " does not have the rows of ", T, " steps of ", B, " sequences");
    p->T = int(T);
    p->B = int(B);
    p->H = int(H);
    p->D = int(D);
    p->rows = rows;
  }
  // The numbers of cuda_plan. They are checked: a kernel would write past the end of its memory.
  void read_plan(const std::vector<i64>& plan, bool backward, Layer* p) const {
    FASTLSTM_CHECK(plan.size() == 11 && *std::min_element(plan.begin(), plan.end()) >= 0 && plan[0] <= 3 &&
                       plan[6] <= 2 && *std::max_element(plan.begin() + 1, plan.begin() + 8) < kTooMuch,
                   "fastlstm: expected a plan of 11 numbers, of cuda_plan");
    p->plan = {Regime(plan[0]), int(plan[1]), int(plan[2]), int(plan[3]), int(plan[4]), int(plan[5]),
               Rest(plan[6]),   int(plan[7]), plan[8],      plan[9],      plan[10]};
    const Plan& q = p->plan;
    FASTLSTM_CHECK(q.regime == Regime::wide ? is_wide(q, p->H) : is_whole(q, p->H),
                   "fastlstm: not a plan of this layer");
    FASTLSTM_CHECK(q.rest == Rest::shared || (q.rest == Rest::global && q.regime == Regime::grid) ||
                       (q.regime != Regime::wide && rest_tiles(q, p->H) == 0),
                   "fastlstm: the plan has no place for all weights");
    p->shared = Shared::of(q, kind, backward, p->H);
    FASTLSTM_CHECK(p->shared.total == q.shared_bytes, "fastlstm: expected a plan of ", p->shared.total,
                   " bytes of shared memory, got ", q.shared_bytes);
  }
  static bool is_whole(const Plan& q, int H) {
    const bool alone = q.blocks == 1 && q.parts == 1;
    return (q.batch == 8 || q.batch == 16) && q.blocks > 0 && q.tiles > 0 && q.parts > 0 && q.tiles <= kMaxWarps &&
           q.parts <= kMaxParts && q.tiles * q.parts <= kMaxWarps && q.groups > 0 &&
           (q.regime != Regime::block || alone) && i64(q.blocks) * q.tiles >= tiles_of(H);
  }
  static bool is_wide(const Plan& q, int H) {
    const WideShape sizes = wide_shape(q.resident);
    return q.batch == kSequences && q.blocks == sizes.blocks && q.tiles == sizes.tiles && q.parts == kWideParts &&
           H <= sizes.units() && q.groups > 0;
  }
  // exchange, arrived, rest: int32, of the sizes in the plan; absent where the plan needs none.
  void read_work_space(const Array& exchange, const Array& arrived, const Array& rest, bool backward, Layer* p) {
    const Plan& q = p->plan;
    launch.groups = D * ((B + q.batch - 1) / q.batch);
    const i64 together = std::min<i64>(q.groups, launch.groups);
    if (q.regime == Regime::grid) {
      FASTLSTM_CHECK(T < kMost / q.blocks, "fastlstm: too many steps for ", q.blocks, " blocks: ", T);
      FASTLSTM_CHECK(q.exchange_words >= together * 2 * Shared::buffer_words(kind, backward, p->H, q.batch),
                     "fastlstm: the plan has too little space for the exchange");
      p->exchange = reinterpret_cast<uint32_t*>(words(exchange, "exchange", q.exchange_words));
      p->arrived = words(arrived, "arrived", launch.groups);
    }
    if (q.rest == Rest::global) {
      FASTLSTM_CHECK(q.rest_words >= together * q.blocks * rest_words_of_a_block(q, kind, p->H),
                     "fastlstm: the plan has too little space for weights");
      p->rest = reinterpret_cast<uint32_t*>(words(rest, "rest", q.rest_words));
    }
  }
};

void lstm_recur_fwd(Handle input_product_, const HandleList& w_hh_, const HandleList& biases_, OptionalHandle h0_,
                    OptionalHandle c0_, OptionalHandle offsets_, OptionalHandle lengths_, OptionalHandle reset_, i64 T,
                    i64 B, Handle y_, Handle h_n_, Handle c_n_, OptionalHandle c_all_, OptionalHandle gates_,
                    OptionalHandle exchange_, OptionalHandle arrived_, OptionalHandle rest_,
                    const std::vector<i64>& plan, bool tf32, i64 device, i64 stream) {
  const std::vector<Array> w_hh = to_arrays(w_hh_), biases = to_arrays(biases_);
  const Array input_product(input_product_), h0(h0_), c0(c0_), offsets(offsets_), lengths(lengths_), reset(reset_),
      y(y_), h_n(h_n_), c_n(c_n_), c_all(c_all_), gates(gates_), exchange(exchange_), arrived(arrived_), rest(rest_);
  Forward p{};
  Call call(y, w_hh, offsets, lengths, reset, T, B, plan, tf32, false, exchange, arrived, rest, device, stream, &p);
  const int32_t f32 = aoti_torch_dtype_float32();
  const i64 H = call.H, D = call.D;
  p.input_product = static_cast<const float*>(dense(input_product, "the input product", f32, {D, call.rows, 4 * H}));
  FASTLSTM_CHECK(biases.empty() || i64(biases.size()) == 2 * D, "fastlstm: expected 2 biases for each direction");
  for (i64 d = 0; d < D && !biases.empty(); ++d) {
    p.b_ih[d] = dense(biases[size_t(2 * d)], "bias_ih", call.type, {4 * H});
    p.b_hh[d] = dense(biases[size_t(2 * d + 1)], "bias_hh", call.type, {4 * H});
  }
  p.h0 = call.states(h0, "h0");
  p.c0 = call.states(c0, "c0");
  p.y = call.steps(y, "y", call.type);
  p.h_n = call.states(h_n, "h_n");
  p.c_n = call.states(c_n, "c_n");
  p.c_all = static_cast<float*>(call.steps(c_all, "c_all", f32));
  p.gates = dense(gates, "gates", call.type, {D, call.rows, 4 * H}, 16);
  call.launch.run(p);
}

void lstm_recur_bwd(Handle y_, const HandleList& w_hh_, OptionalHandle offsets_, OptionalHandle lengths_,
                    OptionalHandle reset_, i64 T, i64 B, Handle gates_, Handle c_all_, OptionalHandle c0_,
                    OptionalHandle dy_, OptionalHandle dh_n_, OptionalHandle dc_n_, OptionalHandle dc_all_,
                    Handle dgates_, OptionalHandle dh0_, OptionalHandle dc0_, OptionalHandle exchange_,
                    OptionalHandle arrived_, OptionalHandle rest_, const std::vector<i64>& plan, bool tf32, i64 device,
                    i64 stream) {
  const std::vector<Array> w_hh = to_arrays(w_hh_);
  const Array y(y_), offsets(offsets_), lengths(lengths_), reset(reset_), gates(gates_), c_all(c_all_), c0(c0_),
      dy(dy_), dh_n(dh_n_), dc_n(dc_n_), dc_all(dc_all_), dgates(dgates_), dh0(dh0_), dc0(dc0_), exchange(exchange_),
      arrived(arrived_), rest(rest_);
  Backward p{};
  Call call(y, w_hh, offsets, lengths, reset, T, B, plan, tf32, true, exchange, arrived, rest, device, stream, &p);
  const int32_t f32 = aoti_torch_dtype_float32();
  const i64 H = call.H, D = call.D;
  p.gates = dense(gates, "gates", call.type, {D, call.rows, 4 * H}, 16);
  p.c_all = static_cast<const float*>(call.steps(c_all, "c_all", f32));
  p.c0 = static_cast<const float*>(dense(c0, "c0", f32, {D, B, H}));
  p.dy = call.strided(dy, "dy", &p.dy_t, &p.dy_b);
  p.dc_all = call.strided(dc_all, "dc_all", &p.dc_t, &p.dc_b);
  p.dh_n = call.states(dh_n, "dh_n");
  p.dc_n = call.states(dc_n, "dc_n");
  p.dgates = dense(dgates, "dgates", call.type, {D, call.rows, 4 * H});
  p.dh0 = call.states(dh0, "dh0");
  p.dc0 = call.states(dc0, "dc0");
  call.launch.run(p);
}

}  // namespace

#if defined(FASTLSTM_EMULATE) || defined(FASTLSTM_STUB)  // the stub: of the CUDA runtime, in tests
STABLE_TORCH_LIBRARY_IMPL(fastlstm, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastlstm, CUDA, m) {
#endif
  m.impl("lstm_recur_fwd", TORCH_BOX(&Guarded<&lstm_recur_fwd>::call));
  m.impl("lstm_recur_bwd", TORCH_BOX(&Guarded<&lstm_recur_bwd>::call));
}

STABLE_TORCH_LIBRARY_IMPL(fastlstm, CompositeExplicitAutograd, m) { m.impl("cuda_device", TORCH_BOX(&device_facts)); }

}  // namespace fastlstm::cuda
