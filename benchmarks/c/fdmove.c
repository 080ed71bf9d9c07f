/*
 * What the kernel takes to move file descriptors, with nothing around it: the measure for luod.
 *
 *   fdmove pass COUNT BATCH    a client stores COUNT fds with a keeper process and gets them back, BATCH a message, each answered.
 *   fdmove handover COUNT      stop-and-copy: a server that holds COUNT fds and one connected client stops serving, sends everything to
 *                              its (already running) successor, which acknowledges and serves. The client makes round trips all the while.
 *
 * One JSON object on stdout. All sockets are SEQPACKET pairs, fds travel as SCM_RIGHTS.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MAX_BATCH = 253, WARM_UP = 2000, AFTER = 2000 };

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static double now_us(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static void *array_of(size_t count, size_t size)
{
	void *memory = calloc(count ? count : 1, size);
	if (!memory)
		die("calloc");
	return memory;
}

static void send_fds(int sock, char tag, const int *fds, int count)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(MAX_BATCH * sizeof(int))];
	} control;
	struct iovec part = {.iov_base = &tag, .iov_len = 1};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
	if (count) {
		message.msg_control = &control;
		message.msg_controllen = CMSG_SPACE((size_t)count * sizeof(int));
		struct cmsghdr *head = CMSG_FIRSTHDR(&message);
		head->cmsg_level = SOL_SOCKET;
		head->cmsg_type = SCM_RIGHTS;
		head->cmsg_len = CMSG_LEN((size_t)count * sizeof(int));
		memcpy(CMSG_DATA(head), fds, (size_t)count * sizeof(int));
	}
	while (sendmsg(sock, &message, MSG_NOSIGNAL) < 0) {
		if (errno != ETOOMANYREFS && errno != EINTR)
			die("sendmsg");
		sched_yield(); /* an ordinary user's in-flight limit: the receiver is draining */
	}
}

/* Returns how many fds came, or -1 at the end of the connection. */
static int receive_fds(int sock, char *tag, int *fds)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(MAX_BATCH * sizeof(int))];
	} control;
	struct iovec part = {.iov_base = tag, .iov_len = 1};
	struct msghdr message = {
		.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
	ssize_t got = recvmsg(sock, &message, MSG_CMSG_CLOEXEC);
	if (got < 0)
		die("recvmsg");
	if (message.msg_flags & (MSG_CTRUNC | MSG_TRUNC)) {
		fputs("fdmove: truncated: RLIMIT_NOFILE?\n", stderr);
		exit(1);
	}
	if (got == 0)
		return -1;
	int count = 0;
	for (struct cmsghdr *head = CMSG_FIRSTHDR(&message); head; head = CMSG_NXTHDR(&message, head)) {
		if (head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_RIGHTS)
			continue;
		int here = (int)((head->cmsg_len - CMSG_LEN(0)) / sizeof(int));
		memcpy(fds + count, CMSG_DATA(head), (size_t)here * sizeof(int));
		count += here;
	}
	return count;
}

static void expect(int sock, char wanted)
{
	char tag = 0;
	int fds[MAX_BATCH];
	if (receive_fds(sock, &tag, fds) != 0 || tag != wanted) {
		fprintf(stderr, "fdmove: expected '%c', got '%c'\n", wanted, tag);
		exit(1);
	}
}

static void pair(int sides[2])
{
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sides) < 0)
		die("socketpair");
}

static int *make_fds(int count)
{
	int *fds = array_of((size_t)count, sizeof *fds);
	for (int i = 0; i < count; i++) {
		fds[i] = memfd_create("bench", MFD_CLOEXEC);
		if (fds[i] < 0)
			die("memfd_create (raise RLIMIT_NOFILE)");
	}
	return fds;
}

static void close_fds(const int *fds, int count)
{
	for (int i = 0; i < count; i++)
		close(fds[i]);
}

static pid_t child(void)
{
	pid_t pid = fork();
	if (pid < 0)
		die("fork");
	if (pid == 0)
		prctl(PR_SET_PDEATHSIG, SIGKILL);
	return pid;
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return (x > y) - (x < y);
}

static double median(double *values, int count)
{
	qsort(values, (size_t)count, sizeof *values, by_value);
	return values[count / 2];
}

/* ---- pass ---- */

static void keep(int sock, int count, int batch)
{
	int *fds = array_of((size_t)count + MAX_BATCH, sizeof *fds);
	int held = 0;
	char tag;
	for (;;) {
		int came = receive_fds(sock, &tag, fds + held);
		if (came < 0)
			exit(0);
		if (tag == 's') {
			held += came;
			send_fds(sock, 'k', NULL, 0);
		} else {
			int give = held < batch ? held : batch;
			held -= give;
			send_fds(sock, 'g', fds + held, give);
			close_fds(fds + held, give);
		}
	}
}

static int pass(int count, int batch)
{
	int sides[2];
	pair(sides);
	pid_t keeper = child();
	if (keeper == 0) {
		close(sides[0]);
		keep(sides[1], count, batch);
	}
	close(sides[1]);
	int *fds = make_fds(count);
	double start = now_us();
	for (int i = 0; i < count; i += batch) {
		send_fds(sides[0], 's', fds + i, count - i < batch ? count - i : batch);
		expect(sides[0], 'k');
	}
	double stored = now_us();
	close_fds(fds, count);
	int got = 0;
	double again = now_us();
	while (got < count) {
		char tag;
		int came[MAX_BATCH];
		send_fds(sides[0], 'r', NULL, 0);
		int here = receive_fds(sides[0], &tag, came);
		if (here <= 0) {
			fputs("fdmove: nothing came back\n", stderr);
			exit(1);
		}
		memcpy(fds + got, came, (size_t)here * sizeof(int));
		got += here;
	}
	double back = now_us();
	close(sides[0]);
	waitpid(keeper, NULL, 0);
	printf("{\"store_us\": %.3f, \"retrieve_us\": %.3f}\n", (stored - start) / count, (back - again) / count);
	return 0;
}

/* ---- handover ---- */

/*
 * Round trips until the successor says that it was the last one. To `report` go the gap between the last answer of the old server and the
 * first of the new one, the worst gap of all, and the median round trip.
 */
static void loop(int sock, int report)
{
	enum { MOST = 1 << 20 };
	double *trips = array_of(MOST, sizeof *trips);
	int count = 0;
	double gap = 0, worst = 0, last = 0;
	char tag = 'a';
	for (;;) {
		char before = tag;
		int fds[MAX_BATCH];
		double start = now_us();
		send_fds(sock, 'e', NULL, 0);
		if (receive_fds(sock, &tag, fds) < 0)
			exit(1);
		double end = now_us();
		trips[count++ % MOST] = end - start;
		if (last > 0 && end - last > worst)
			worst = end - last;
		if (tag != before && before == 'a')
			gap = end - last;
		last = end;
		if (tag == 'q')
			break;
	}
	double result[3] = {gap, worst, median(trips, count < MOST ? count : MOST)};
	if (write(report, result, sizeof result) != sizeof result)
		die("write");
	exit(0);
}

static void succeed(int handover, int count)
{
	int *fds = array_of((size_t)count + MAX_BATCH, sizeof *fds);
	int held = 0, client = -1;
	char tag;
	send_fds(handover, 'r', NULL, 0);
	while (client < 0) {
		int came = receive_fds(handover, &tag, fds + held);
		if (came < 0)
			exit(1);
		if (tag == 'c')
			client = fds[held];
		else
			held += came;
	}
	if (held != count) {
		fprintf(stderr, "fdmove: %d of %d fds arrived\n", held, count);
		exit(1);
	}
	send_fds(handover, 'k', NULL, 0);
	for (int i = 0; i < AFTER; i++) {
		expect(client, 'e');
		send_fds(client, i == AFTER - 1 ? 'q' : 'b', NULL, 0);
	}
	exit(0);
}

static int handover(int count)
{
	int connection[2], succession[2], report[2];
	pair(connection);
	pair(succession);
	if (pipe2(report, O_CLOEXEC) < 0)
		die("pipe2");
	pid_t successor = child();
	if (successor == 0) {
		close(succession[0]);
		close(connection[0]);
		close(connection[1]);
		succeed(succession[1], count);
	}
	pid_t client = child();
	if (client == 0) {
		close(connection[0]);
		loop(connection[1], report[1]);
	}
	close(connection[1]);
	close(succession[1]);
	close(report[1]);
	int *fds = make_fds(count);
	expect(succession[0], 'r');
	for (int i = 0; i < WARM_UP; i++) {
		expect(connection[0], 'e');
		send_fds(connection[0], 'a', NULL, 0);
	}
	double start = now_us();
	for (int i = 0; i < count; i += MAX_BATCH)
		send_fds(succession[0], 'f', fds + i, count - i < MAX_BATCH ? count - i : MAX_BATCH);
	send_fds(succession[0], 'c', &connection[0], 1);
	expect(succession[0], 'k');
	double copied = now_us();
	double result[3];
	if (read(report[0], result, sizeof result) != sizeof result) {
		fputs("fdmove: the client or the successor failed\n", stderr);
		return 1;
	}
	waitpid(client, NULL, 0);
	waitpid(successor, NULL, 0);
	printf("{\"copy_us\": %.3f, \"gap_us\": %.3f, \"worst_gap_us\": %.3f, \"round_trip_us\": %.3f}\n", copied - start, result[0],
	       result[1], result[2]);
	return 0;
}

int main(int argc, char **argv)
{
	struct rlimit limit;
	if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
		die("getrlimit");
	limit.rlim_cur = limit.rlim_max;
	if (setrlimit(RLIMIT_NOFILE, &limit) < 0)
		die("setrlimit");
	if (argc == 4 && !strcmp(argv[1], "pass") && atoi(argv[2]) > 0 && atoi(argv[3]) > 0 && atoi(argv[3]) <= MAX_BATCH)
		return pass(atoi(argv[2]), atoi(argv[3]));
	if (argc == 3 && !strcmp(argv[1], "handover") && atoi(argv[2]) >= 0)
		return handover(atoi(argv[2]));
	fputs("usage: fdmove pass COUNT BATCH | fdmove handover COUNT\n", stderr);
	return 2;
}
