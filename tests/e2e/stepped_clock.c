// A wall clock that a test steps, for the programs it starts: CLOCK_STEP names a file of eight bytes, the seconds to add
// (signed, this machine's byte order); it is read at every look at the clock. Other clocks stay: timers keep their pace.
// libfaketime does the same and more; workerd hangs under it before its first line.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timex.h>
#include <time.h>
#include <unistd.h>

static volatile const int64_t *step;

__attribute__((constructor)) static void open_step(void) {
  const char *name = getenv("CLOCK_STEP");
  int file = name ? open(name, O_RDONLY | O_CLOEXEC) : -1;
  if (file < 0) return;
  void *page = mmap(0, sizeof *step, PROT_READ, MAP_SHARED, file, 0);
  if (page != MAP_FAILED) step = page;
  close(file);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  int failed = syscall(SYS_clock_gettime, clock, now);
  if (!failed && step && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += *step;
  return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
  struct timespec at;
  int failed = clock_gettime(CLOCK_REALTIME, &at);
  now->tv_sec = at.tv_sec;
  now->tv_usec = at.tv_nsec / 1000;
  return failed;
}

time_t time(time_t *out) {
  struct timespec at;
  clock_gettime(CLOCK_REALTIME, &at);
  if (out) *out = at.tv_sec;
  return at.tv_sec;
}

/* A time server has set it, whatever this machine's kernel says of its own. */
int adjtimex(struct timex *state) {
  (void)state;
  return TIME_OK;
}
