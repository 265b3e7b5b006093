// The pool of threads on its own, for the thread sanitizer. test_pool.py builds it.
//
//   pool WHAT    exits with 0 if every item of every region was computed once; 66 after a race
//   pool quota MEMBERSHIP ROOT    prints quota_cores of a file and a folder
//   pool uneven DEVICES           prints uneven_cores of a folder
//   pool third DEVICES            prints nearest_third_level of a folder
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/cores.h"
#include "cpu/parallel.h"

using namespace fastlstm;

namespace {

void check(bool right, const char* what) {
  if (right) return;
  std::printf("WRONG: %s\n", what);
  std::_Exit(1);
}

void rest(int microseconds) { std::this_thread::sleep_for(std::chrono::microseconds(microseconds)); }

// Threads of somebody else, some of which come late.
void lend(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
  std::vector<std::thread> others;
  for (int64_t k = 1; k < n; ++k)
    others.emplace_back([=] {
      if (k % 2) rest(300);
      body(k, k + 1, context);
    });
  body(0, 1, context);
  for (std::thread& other : others) other.join();
}
constexpr Threads::Lender kLent = {lend, 1};

// Regions of one call. The counts are plain numbers: only the pool orders who writes and who reads them.
void call(int wanted, uint64_t kind, int regions, int items, Threads::Lender lender, int pause = 0) {
  Threads threads(wanted, kind, lender);
  std::vector<int> counts(size_t(items), 0);
  together(threads, [&] {
    for (int region = 1; region <= regions; ++region) {
      parallel(
          threads, items,
          [&](i64 item) {
            if (pause && item % 5 == 0) rest(pause);
            ++counts[size_t(item)];
          },
          region % 2);
      for (int count : counts) check(count == region, "an item was not computed once");
    }
  });
}

void callers(Threads::Lender lender) {
  std::vector<std::thread> all;
  for (int k = 0; k < 6; ++k)
    all.emplace_back([=] {
      for (int n = 0; n < 60; ++n) call(1 + (k + n) % 5, uint64_t(k), 1 + n % 7, 1 + (n * 13) % 40, lender);
    });
  for (std::thread& caller : all) caller.join();
}

void failing() {
  for (int n = 0; n < 200; ++n) {
    Threads threads(4, 9, n % 2 ? kLent : Threads::Lender{});
    std::atomic<int> done{0};
    bool caught = false;
    try {
      together(threads, [&] {
        parallel(threads, 20, [&](i64 item) {
          done.fetch_add(1);
          if (item % 7 == n % 7) throw std::runtime_error("item");
        });
      });
    } catch (const std::runtime_error& error) {
      caught = !std::strcmp(error.what(), "item");
    }
    check(caught, "the exception of an item did not reach its caller");
    call(4, 9, 2, 20, {});
  }
}

void forks() {
  for (int n = 0; n < 100; ++n) {
    call(4, 1, 3, 20, n % 2 ? kLent : Threads::Lender{});
    const pid_t child = fork();
    if (child == 0) {
      call(4, 1, 3, 20, {});
      std::_Exit(0);
    }
    int status = -1;
    check(waitpid(child, &status, 0) == child && status == 0, "a child failed");
  }
}

std::string text_of(const char* path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

}  // namespace

int main(int count, char** words) {
  const std::string what = count > 1 ? words[1] : "";
  if (what == "quota" && count == 4) {
    std::printf("%d\n", quota_cores(text_of(words[2]), words[3]));
    return 0;
  }
  if (what == "uneven" && count == 3) {
    std::printf("%d\n", uneven_cores(words[2]));
    return 0;
  }
  if (what == "third" && count == 3) {
    std::printf("%lld\n", static_cast<long long>(nearest_third_level(words[2])));
    return 0;
  }
  if (what == "callers") {
    callers({});
    callers(kLent);
  } else if (what == "late") {
    for (int n = 0; n < 30; ++n) call(4, 2, 5, 12, {}, n % 3 ? 50 : 1000), rest(n % 4 * 100);
    for (int n = 0; n < 30; ++n) call(4, 3, 5, 12, kLent, 50);
  } else if (what == "failing") {
    failing();
  } else if (what == "forks") {
    forks();
  } else if (what == "threads") {
    for (int n = 0; n < 1000; ++n) std::thread([=] { call(4, 4, 2, 9, {}); }).join();
  } else {
    return 2;
  }
  std::printf("right\n");
  return 0;
}
