// Ensembles: several layers of the same sizes in one call, as torch.func.vmap makes them. Every tensor of such a call
// has a first dimension more, [members, ...].
#pragma once

#include <algorithm>
#include <cstring>
#include <deque>
#include <optional>
#include <vector>

#include "bindings/passes.h"
#include "cpu/parallel.h"

namespace fastlstm {

// The part of an argument that belongs to member k: of a tensor [members, ...] what lies at k, as a view; of anything
// else all of it.
template <class T>
T member(T option, i64, i64) {
  return option;
}
inline Array member(const Array& t, i64 k, i64 members) {
  if (!t) return Array();
  FASTLSTM_CHECK(t.dim > 0 && t.sizes[0] == members, "fastlstm: expected ", members, " members, got a tensor ",
                 t.shape_text());
  t.check_storage("a tensor");
  return t.at(k);
}
inline std::vector<Array> member(const std::vector<Array>& tensors, i64 k, i64 members) {
  std::vector<Array> found;
  found.reserve(tensors.size());
  for (const Array& t : tensors) found.push_back(member(t, k, members));
  return found;
}

// Runs a pass for each member. If there are many members each one takes a thread; if there are few, all threads share
// one member after the other.
template <class Pass, class... Arguments>
void run_members(i64 members, const Arguments&... arguments) {
  FASTLSTM_CHECK(members > 0, "fastlstm: expected a positive number of members, got ", members);
  std::deque<Pass> passes;
  for (i64 k = 0; k < members; ++k) passes.emplace_back(member(arguments, k, members)...);
  Pass& first = passes.front();
  PassThreads threads(first.call.sizes, Pass::kBackward, members);
  const auto same_weights = [&](const Pass& pass) {
    return !std::memcmp(pass.call.weights, first.call.weights, sizeof first.call.weights);
  };
  std::optional<PackedWeights> shared;
  if (std::all_of(passes.begin(), passes.end(), same_weights))
    shared.emplace(first.call, first.orders(), Array(), threads);
  const auto run = [&](i64 k, Threads& its_threads) {
    Pass& pass = passes[size_t(k)];
    if (shared) {
      pass.run(*shared, its_threads);
    } else {
      pass.run(PackedWeights(pass.call, pass.orders(), Array(), its_threads), its_threads);
    }
  };
  together(threads, [&] {
    if (2 * members <= threads.count()) {
      for (i64 k = 0; k < members; ++k) run(k, threads);
    } else {
      parallel(threads, members, [&](i64 k) {
        Threads alone;
        run(k, alone);
      });
    }
  });
}

// Runs a pass for all members, or one pass where `members` is 0.
template <class Pass, class... Arguments>
void run_pass(i64 members, const Array& cache, const Arguments&... arguments) {
  if (members) return run_members<Pass>(members, arguments...);
  Pass pass(arguments...);
  PassThreads threads(pass.call.sizes, Pass::kBackward);
  together(threads, [&] { pass.run(PackedWeights(pass.call, pass.orders(), cache, threads), threads); });
}

}  // namespace fastlstm
