/* A libnccl of CPUs: the same functions, the same bytes, carried by files in a folder, which the unique id names.

   Calls keep NCCL's manners as far as a sender can tell them apart: a non-blocking communicator answers "in progress"
   until every rank is there, a broadcast's root does not wait for anybody, a receiver waits for its bytes, and finds an
   error where their number is not the one it expects, or rank 0 has left. A file `fail-0-0` in the folder is an error of
   the network. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6, IN_PROGRESS = 7 };
enum { WAIT_TICKS = 60000 }; /* of a millisecond */

typedef struct { char internal[128]; } Id;
typedef struct { size_t size; unsigned magic, version; int blocking; } Config;
typedef struct { char folder[128]; int rank, ranks, sequence; } Comm;

static const size_t SIZES[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1};

static void path_of(char *path, const Comm *comm, const char *what, int number, int rank) {
  snprintf(path, 256, "%s/%s-%d-%d", comm->folder, what, number, rank);
}

static int exists(const char *path) { return access(path, F_OK) == 0; }

static void pause_a_tick(void) {
  struct timespec tick = {0, 1000000};
  nanosleep(&tick, NULL);
}

static int write_whole(const char *path, const void *bytes, size_t size) {
  char partial[260];
  snprintf(partial, sizeof partial, "%s.p", path);
  FILE *file = fopen(partial, "wb");
  if (!file) return 2;
  fwrite(bytes, 1, size, file);
  fclose(file);
  return rename(partial, path) == 0 ? OK : 2;
}

static int left_by_the_first(const Comm *comm) {
  char path[256];
  path_of(path, comm, "gone", 0, 0);
  return exists(path);
}

static int read_when_there(const char *path, const Comm *comm, void *bytes, size_t size) {
  struct stat found;
  for (int i = 0; !exists(path); i++) {
    if (i == WAIT_TICKS || left_by_the_first(comm)) return REMOTE_ERROR;
    pause_a_tick();
  }
  if (stat(path, &found) || (size_t)found.st_size != size) return INVALID_USAGE;
  FILE *file = fopen(path, "rb");
  if (!file) return 2;
  size_t got = fread(bytes, 1, size, file);
  fclose(file);
  return got == size ? OK : 2;
}

static int state(const Comm *comm) {
  char path[256];
  path_of(path, comm, "fail", 0, 0);
  if (exists(path)) return REMOTE_ERROR;
  for (int rank = 0; rank < comm->ranks; rank++) {
    path_of(path, comm, "here", 0, rank);
    if (!exists(path)) return IN_PROGRESS;
  }
  return OK;
}

const char *ncclGetErrorString(int result) {
  return result == INVALID_USAGE ? "invalid usage" : result == REMOTE_ERROR ? "remote process exited" : "an error";
}

int ncclGetVersion(int *version) {
  *version = 22809;
  return OK;
}

int ncclGetUniqueId(Id *id) {
  memset(id, 0, sizeof *id);
  snprintf(id->internal, sizeof id->internal, "%s/XXXXXX", getenv("STANDIN_NCCL"));
  return mkdtemp(id->internal) ? OK : 2;
}

int ncclCommInitRankConfig(Comm **comm, int ranks, Id id, int rank, Config *config) {
  if (config->magic != 0xcafebeef || config->size < sizeof(Config) || config->version < 21400) return INVALID_ARGUMENT;
  char path[256];
  *comm = calloc(1, sizeof(Comm));
  memcpy((*comm)->folder, id.internal, sizeof id.internal);
  (*comm)->rank = rank;
  (*comm)->ranks = ranks;
  path_of(path, *comm, "here", 0, rank);
  if (exists(path)) return INVALID_USAGE; /* two members of one rank */
  int result = write_whole(path, "", 0);
  if (result || !config->blocking) return result ? result : IN_PROGRESS;
  for (int i = 0; state(*comm) == IN_PROGRESS && i < WAIT_TICKS && !left_by_the_first(*comm); i++) pause_a_tick();
  return state(*comm) == IN_PROGRESS ? REMOTE_ERROR : state(*comm);
}

int ncclCommInitRank(Comm **comm, int ranks, Id id, int rank) {
  Config config = {sizeof(Config), 0xcafebeef, 21400, 1};
  return ncclCommInitRankConfig(comm, ranks, id, rank, &config);
}

int ncclCommGetAsyncError(Comm *comm, int *found) {
  *found = state(comm);
  return OK;
}

int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, Comm *comm, void *stream) {
  char path[256];
  path_of(path, comm, "broadcast", comm->sequence++, root);
  if (comm->rank == root) return write_whole(path, from, count * SIZES[type]);
  return read_when_there(path, comm, to, count * SIZES[type]);
}

int ncclAllReduce(const void *from, void *to, size_t count, int type, int op, Comm *comm, void *stream) {
  char path[256];
  float sum = 0, one;
  if (count != 1 || type != 7 || op != 0) return INVALID_USAGE;
  path_of(path, comm, "reduce", comm->sequence, comm->rank);
  int result = write_whole(path, from, sizeof(float));
  for (int rank = 0; comm->rank && !result && rank < comm->ranks; rank++) {
    path_of(path, comm, "reduce", comm->sequence, rank);
    result = read_when_there(path, comm, &one, sizeof one);
    sum += one;
  }
  if (comm->rank) memcpy(to, &sum, sizeof sum);
  comm->sequence++;
  return result;
}

int ncclCommAbort(Comm *comm) {
  char path[256];
  path_of(path, comm, "gone", 0, comm->rank);
  write_whole(path, "", 0);
  free(comm);
  return OK;
}

int ncclCommDestroy(Comm *comm) { return ncclCommAbort(comm); }

/* vLLM looks these up and does not call them. */
#define UNUSED(name) int name(void) { return INVALID_USAGE; }
UNUSED(ncclReduce)
UNUSED(ncclAllGather)
UNUSED(ncclReduceScatter)
UNUSED(ncclSend)
UNUSED(ncclRecv)
UNUSED(ncclCommSuspend)
UNUSED(ncclCommResume)
UNUSED(ncclGroupStart)
UNUSED(ncclGroupEnd)
UNUSED(ncclCommWindowRegister)
UNUSED(ncclCommWindowDeregister)
UNUSED(ncclCommQueryProperties)
