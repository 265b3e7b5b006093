#include "triton/layer.h"

#include <algorithm>
#include <numeric>

namespace fastlstm::ahead {

bool is_in_tf32(bool matmul) {
  std::array stack{torch::stable::detail::from(matmul)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("fastlstm::triton_tf32", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack[0]);
}

bool aligned(const Array& t, uintptr_t bytes) { return !t || reinterpret_cast<uintptr_t>(t.data) % bytes == 0; }

namespace {

std::optional<Kind> kind_of(int32_t dtype, std::optional<bool> in_tf32) {
  if (dtype == aoti_torch_dtype_bfloat16()) return Kind::bf16;
  if (dtype == aoti_torch_dtype_float16()) return Kind::f16;
  if (dtype != aoti_torch_dtype_float32()) return std::nullopt;
  return (in_tf32 ? *in_tf32 : is_in_tf32(false)) ? Kind::tf32 : Kind::exact;
}

void check_on_host(const Array& batch_sizes) {
  FASTLSTM_CHECK(Place::of(batch_sizes.handle()).is_cpu(), "fastlstm: batch_sizes must be on the CPU");
}

// How many sequences a call has; 0 of one that is refused later.
i64 sequences_of(const Array& x, const Array& batch_sizes) {
  if (!batch_sizes) return x.dim == 3 ? x.sizes[1] : 0;
  const bool known = batch_sizes.dtype == aoti_torch_dtype_int64() && batch_sizes.dim == 1 && batch_sizes.sizes[0] > 0;
  check_on_host(batch_sizes);
  return known ? *static_cast<const i64*>(batch_sizes.data) : 0;
}

std::atomic<bool> paused_{false};

}  // namespace

void pause(bool paused) { paused_.store(paused, std::memory_order_relaxed); }

Question::Question(const Array& x, const Array* weights, size_t count, i64 directions, bool back,
                   const Array& batch_sizes, bool more, std::optional<bool> in_tf32)
    : device(nullptr), row(nullptr) {
  FASTLSTM_CHECK(directions == 1 || directions == 2, "fastlstm: expected 1 or 2 directions, got ", directions);
  if (more || paused_.load(std::memory_order_relaxed)) return;
  const size_t each = count / size_t(directions);
  const std::optional<Kind> found = kind_of(x.dtype, in_tf32);
  if (!found || (each != 2 && each != 4) || !x.dim || weights[1].dim != 2) return;  // an odd number: of a projection
  kind = *found;
  I = x.last();
  H = weights[1].last();
  device = device_of(std::max(Place::of(x.handle()).index, 0));
  if (device) row = device->plan({back, kind, I, H, directions, sequences_of(x, batch_sizes)});
}

Rows::Rows(const Array& x, const Array& batch_sizes, Array lengths_, Array reset_, const Place& place)
    : lengths(dense(std::move(lengths_), place)), reset(dense(std::move(reset_), place)) {
  count = x.sizes[0];
  if (batch_sizes) {
    read_packed(batch_sizes, place);
    return;
  }
  FASTLSTM_CHECK(x.dim == 3, "fastlstm: expected input [T, B, I], got ", x.shape_text());
  T = x.sizes[0];
  B = x.sizes[1];
  count = T * B;
  if (lengths) lengths.check_shape("lengths", {B});
  if (reset) reset.check_shape("reset", {T, B});
}

void Rows::read_packed(const Array& batch_sizes, const Place& place) {
  FASTLSTM_CHECK(batch_sizes.dtype == aoti_torch_dtype_int64() && batch_sizes.dim == 1 && batch_sizes.contiguous(),
                 "fastlstm: batch_sizes must be int64 [T]");
  check_on_host(batch_sizes);
  const i64* first = static_cast<const i64*>(batch_sizes.data);
  sizes.assign(first, first + batch_sizes.sizes[0]);
  const bool falls = std::is_sorted(sizes.rbegin(), sizes.rend());
  FASTLSTM_CHECK(!sizes.empty() && sizes.back() > 0 && falls,
                 "fastlstm: batch_sizes must be positive and never increase");
  const i64 sum = std::accumulate(sizes.begin(), sizes.end(), i64(0));
  FASTLSTM_CHECK(sum == count, "fastlstm: batch_sizes add up to ", sum, " rows, the input has ", count);
  T = i64(sizes.size());
  B = sizes[0];
  std::vector<i64> numbers;
  for (i64 row = 0, t = 0; t < T; row += sizes[size_t(t++)]) starts.push_back(row);
  numbers = starts;
  for (i64 b = 0, t = T; b < B; ++b) {
    while (sizes[size_t(t - 1)] <= b) --t;
    numbers.push_back(t);
  }
  both = on_device(numbers, place);
}

Array Rows::states_before(const Array& y, const Array& start, i64 direction, const Place& place) const {
  const i64 H = y.sizes[1];
  Array h = place.empty({count, H}, y.dtype);
  Array none;
  if (packed()) {
    if (!start) none = place.zeros({B, H}, y.dtype);
    std::vector<i64> before(size_t(count), 0), first(static_cast<size_t>(B));
    for (i64 t = 0; t < T; ++t) {
      const i64 other = direction == 0 ? t - 1 : t + 1, size = sizes[size_t(t)], row = starts[size_t(t)];
      const bool there = other >= 0 && other < T;
      const i64 both_steps = there ? std::min(size, sizes[size_t(other)]) : 0;  // sequences, the first ones
      if (there) std::iota(&before[size_t(row)], &before[size_t(row)] + both_steps, starts[size_t(other)]);
      for (i64 b = both_steps; b < size; ++b) first[size_t(b)] = row + b;
    }
    select_rows(h, y, on_device(before, place));
    put_rows(h, on_device(first, place), start ? start : none);
  } else {
    const i64 rest = count - B, from = direction == 0 ? 0 : B, to = direction == 0 ? B : 0;
    if (rest > 0) copy(rows_of(h, to, rest), rows_of(y, from, rest));
    const Array edge = rows_of(h, direction == 0 ? 0 : rest, B);
    start ? copy(edge, start) : zero(edge);
    if (start && lengths && direction == 1)
      put_where(view(h, {T, B, H}, {B * H, H, 1}), is_last(lengths, T, B, place),
                view(start, {1, B, H}, {B * H, H, 1}));
  }
  if (reset) zero_where(h, view(reset, {count, 1}, {1, 1}));
  return h;
}

std::vector<Weights> Weights::split(Array* flat, size_t count, i64 directions, int32_t dtype, const Place& place) {
  std::vector<Weights> found(static_cast<size_t>(directions));
  const bool bias = i64(count) == 4 * directions;
  const auto take = [&] {
    Array& t = *flat++;
    t.check_dtype("a weight", dtype);
    check_place(t, "a weight", place);
    return dense(std::move(t), place);
  };
  for (Weights& each : found) {
    each.w_ih = take();
    each.w_hh = take();
    if (!bias) continue;
    each.b_ih = take();
    each.b_hh = take();
  }
  const i64 H = found[0].w_hh.last(), I = found[0].w_ih.last();
  for (const Weights& each : found) {
    each.w_ih.check_shape("weight_ih", {4 * H, I});
    each.w_hh.check_shape("weight_hh", {4 * H, H});
    if (!bias) continue;
    each.b_ih.check_shape("bias_ih", {4 * H});
    each.b_hh.check_shape("bias_hh", {4 * H});
  }
  return found;
}

std::vector<Weights> Weights::of_copies(const Array& copies, const std::vector<Weights>& like) {
  std::vector<Weights> found(like.size());
  i64 at = 0;
  const auto take = [&](const Array& t) {
    if (!t) return Array();
    const i64 n = t.dim == 2 ? t.sizes[1] : 1;
    Array part = t.dim == 2 ? view(copies, {t.sizes[0], n}, {n, 1}, at) : view(copies, {t.sizes[0]}, {1}, at);
    at += t.sizes[0] * n;
    return part;
  };
  for (size_t d = 0; d < like.size(); ++d) {
    found[d].w_ih = take(like[d].w_ih);
    found[d].w_hh = take(like[d].w_hh);
    found[d].b_ih = take(like[d].b_ih);
    found[d].b_hh = take(like[d].b_hh);
  }
  return found;
}

Array by_unit(const Array& w, const Place& place) {
  const i64 H = w.sizes[0] / 4, n = w.sizes[1];
  Array found = place.empty({4 * H, n}, w.dtype);
  copy(view(found, {H, 4, n}, {4 * n, n, 1}), view(w, {H, 4, n}, {n, H * n, 1}));
  return found;
}

void copy_by_gate(const Array& to, const Array& from) {
  const i64 H = from.sizes[0] / 4, n = from.dim == 2 ? from.sizes[1] : 1;
  copy(view(to, {4, H, n}, {H * n, n, 1}), view(from, {4, H, n}, {n, 4 * n, 1}));
}

void set_rows(Arguments* a, const Rows& rows, i64 H, i64 D) {
  a->set(k_T, rows.T, "steps");
  a->set(k_B, rows.B, "sequences");
  a->set(k_rows, rows.count, "rows");
  a->set(k_H, H, "units");
  a->set(k_D, D, "directions");
  a->set(k_reset, rows.reset);
  a->set(k_lengths, rows.lengths);
  if (!rows.packed()) return;
  a->set(k_offsets, rows.both.data);
  a->set(k_lengths, static_cast<const i64*>(rows.both.data) + rows.T);
}

void set_weights(Arguments* a, const std::vector<Weights>& weights, bool inputs) {
  const Weights &first = weights.front(), &last = weights.back();
  const bool reverse = weights.size() == 2;
  a->set(k_w_hh, first.w_hh);
  if (reverse) a->set(k_w_hh_reverse, last.w_hh);
  if (inputs) a->set(k_w_ih, first.w_ih);
  if (inputs && reverse) a->set(k_w_ih_reverse, last.w_ih);
}

void set_biases(Arguments* a, const std::vector<Weights>& weights) {
  const Weights &first = weights.front(), &last = weights.back();
  a->set(k_b_ih, first.b_ih);
  a->set(k_b_hh, first.b_hh);
  if (weights.size() < 2) return;
  a->set(k_b_ih_reverse, last.b_ih);
  a->set(k_b_hh_reverse, last.b_hh);
}

void check(const Array& t, const char* name, int32_t dtype, i64 count, uintptr_t alignment) {
  if (!t) return;
  t.check_dtype(name, dtype);
  i64 numbers = 1;
  for (i64 k = 0; k < t.dim; ++k) numbers *= t.sizes[k];
  FASTLSTM_CHECK(numbers == count && t.contiguous(), "fastlstm: expected ", name, " of ", count,
                 " numbers, contiguous, got ", t.shape_text());
  FASTLSTM_CHECK(aligned(t, alignment), "fastlstm: ", name, " must be aligned to ", alignment, " bytes");
}

void check_place(const Array& t, const char* name, const Place& place) {
  if (!t) return;
  const Place own = Place::of(t.handle());
  FASTLSTM_CHECK(own.type == place.type && own.index == place.index, "fastlstm: ", name,
                 " is on another device than the input");
}

void check_strided(const Array& t, int32_t dtype, i64 width) {
  if (!t) return;
  t.check_dtype("a gradient", dtype);
  FASTLSTM_CHECK(t.dim >= 2 && t.last() == width && t.last_dense(), "fastlstm: expected a gradient of ", width,
                 " numbers a row, got ", t.shape_text());
}

void set_strides(Arguments* a, Slot step, Slot sequence, const Array& t) {
  if (!t) return;
  a->set(step, t.strides[0], "elements of a step");
  a->set(sequence, t.strides[t.dim - 2], "elements of a sequence");
}

bool even_weights(const std::vector<Weights>& weights, i64 H) {
  return H % 8 == 0 && std::all_of(weights.begin(), weights.end(), [](const Weights& each) {
           return aligned(each.w_ih, kAligned) && aligned(each.w_hh, kAligned);
         });
}

namespace {
bool even_strides(const Array& t) { return t.strides[0] % 2 == 0 && t.strides[t.dim - 2] % 2 == 0; }
}  // namespace

bool even_input(const Array& x) { return x.last() % 2 == 0 && even_strides(x) && aligned(x, 4); }

bool even_gradient(const Array& dy) { return !dy || (even_strides(dy) && aligned(dy, 8)); }

namespace {
thread_local std::string said;  // by an operator in Python, of its error: only that there is one comes through
}

void triton_failed(std::string why) { said = std::move(why); }

Handle given(Array& t) { return t.release().handle; }

OptionalHandle given_or_none(Array& t) { return t ? OptionalHandle(given(t)) : std::nullopt; }

HandleList given(std::vector<Array>& tensors) {
  HandleList found;
  for (Array& t : tensors) found.push_back(given(t));
  return found;
}

Handle shared(const Array& t) {
  Handle copy;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(t.handle(), &copy));
  return copy;
}

OptionalHandle shared_or_none(const Array& t) { return t ? OptionalHandle(shared(t)) : std::nullopt; }

void call_instead(const char* name, StableIValue* stack) {
  said.clear();
  const bool failed = torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS;
  if (failed) throw std::runtime_error(said.empty() ? std::string(name) + " failed" : said);
}

}  // namespace fastlstm::ahead
