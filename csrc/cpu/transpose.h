// Transposes of matrices that lie in far caches or in memory: lines are read and written whole, and those of the next
// block are fetched meanwhile. The hardware fetches nothing ahead in so many rows at once.
#pragma once

#include "cpu/memory.h"

namespace fastlstm {
namespace {

constexpr i64 kLineBytes = 64;  // of the caches of nearly all CPUs
template <class S>
constexpr i64 kLine = kLineBytes / i64(sizeof(S));

// to[i * to_pitch + j] = from[j * from_pitch + i] for 4 x 4: vector reads on every instruction set.
template <class S>
FASTLSTM_INLINE void transpose_quad(S* to, i64 to_pitch, const S* from, i64 from_pitch) {
  typedef S Quad __attribute__((vector_size(4 * sizeof(S))));
  typedef S LooseQuad __attribute__((vector_size(4 * sizeof(S)), aligned(sizeof(S)), may_alias));
  Quad in[4], out[4];
  for (int j = 0; j < 4; ++j) in[j] = *reinterpret_cast<const LooseQuad*>(from + j * from_pitch);
  const Quad ab_low = {in[0][0], in[1][0], in[0][1], in[1][1]};
  const Quad ab_high = {in[0][2], in[1][2], in[0][3], in[1][3]};
  const Quad cd_low = {in[2][0], in[3][0], in[2][1], in[3][1]};
  const Quad cd_high = {in[2][2], in[3][2], in[2][3], in[3][3]};
  out[0] = Quad{ab_low[0], ab_low[1], cd_low[0], cd_low[1]};
  out[1] = Quad{ab_low[2], ab_low[3], cd_low[2], cd_low[3]};
  out[2] = Quad{ab_high[0], ab_high[1], cd_high[0], cd_high[1]};
  out[3] = Quad{ab_high[2], ab_high[3], cd_high[2], cd_high[3]};
  for (int j = 0; j < 4; ++j) *reinterpret_cast<LooseQuad*>(to + j * to_pitch) = out[j];
}

// to(i)[j] = from[j * pitch + i] for i < Rows and j < Columns, multiples of 4. What lies `ahead` numbers further will
// be read next. By way of blocks in L1: a line that is read in part may be gone before the rest is, where rows lie
// apart by a power of two, and stores that fill one in part would each wait for it.
template <class S, int Rows, int Columns, class To>
FASTLSTM_INLINE void transpose_block(const S* from, i64 pitch, i64 ahead, const To& to) {
  alignas(64) S in[Columns][Rows], out[Rows][Columns];
#pragma GCC unroll 1
  for (int j = 0; j < Columns; ++j) {
    __builtin_prefetch(from + j * pitch + ahead, 0, 2);
    std::memcpy(in[j], from + j * pitch, sizeof in[j]);
  }
#pragma GCC unroll 1
  for (int i = 0; i < Rows; i += 4)
    for (int j = 0; j < Columns; j += 4) transpose_quad(&out[i][j], Columns, &in[j][i], Rows);
#pragma GCC unroll 1
  for (int i = 0; i < Rows; ++i) std::memcpy(to(i), out[i], sizeof out[i]);
}

}  // namespace
}  // namespace fastlstm
